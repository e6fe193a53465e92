// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The online softmax over accumulators of wgmma, in which the four threads of a quad share a row.
#pragma once

#include <cute/tensor.hpp>

#include <math_constants.h>

#include "../common/ptx.cuh"
#include "../common/quad.cuh"
#include "../common/softmax_rows.cuh"
#include "config.cuh"

namespace bsfa::sm90 {

// Rows of a warpgroup's tile that a thread has a part in, eight rows apart.
inline constexpr int kThreadRows = 2;

// Accumulators of one wgmma (2 columns, 2 rows, n / 8) as a matrix of the thread's rows and columns.
template <class Accumulators>
__device__ __forceinline__ auto accumulator_matrix(Accumulators&& accumulators) {
  using namespace cute;
  constexpr int kGroups = decltype(size(accumulators))::value / 4;
  return make_tensor(accumulators.data(),
                     Layout<Shape<_2, Shape<_2, Int<kGroups>>>, Stride<_2, Stride<_1, _4>>>{});
}

// The largest score of each of the thread's rows among the thread's columns; of kNan, NaN if one is. Four
// chains a row: the warp has nothing else to do while it waits for one.
template <bool kNan = false, class Matrix>
__device__ __forceinline__ void row_maxima(const Matrix& scores, float (&maxima)[kThreadRows]) {
  constexpr int kChains = 4;
  const auto larger = [](float x, float y)
                          BSFA_INLINE_LAMBDA { return kNan ? ptx::max_nan(x, y) : fmaxf(x, y); };
  float chains[kThreadRows][kChains];
  CUTE_UNROLL
  for (int column = 0; column < cute::size<1>(scores); ++column) {
    CUTE_UNROLL
    for (int row = 0; row < kThreadRows; ++row) {
      float& chain = chains[row][column % kChains];
      chain = column < kChains ? scores(row, column) : larger(chain, scores(row, column));
    }
  }
  CUTE_UNROLL
  for (int row = 0; row < kThreadRows; ++row) {
    maxima[row] = larger(larger(chains[row][0], chains[row][1]), larger(chains[row][2], chains[row][3]));
  }
}

// What can be compared with a bound of known sign instead of the largest score of each of the thread's rows,
// in half the instructions: floats compared as integers, three at a time. The largest bits as signed integers
// are those of the maximum, unless all scores are negative; the smallest as unsigned integers are those of
// the maximum, unless some score is not negative, and then not negative themselves. So
//
//   maximum >= bound  <=>  scores_against<true>  >= bound   where bound > 0,
//                          scores_against<false> >= bound   where bound <= 0.
//
// wgmma's NaN is 0x7fffffff: a positive bound meets it as the largest, any other where no score is positive
// or 0.
template <bool kPositiveBound, class Matrix>
__device__ __forceinline__ void scores_against(const Matrix& scores, float (&values)[kThreadRows]) {
  constexpr int kChains = 2;
  const auto extreme = [](float x, float y, float z) BSFA_INLINE_LAMBDA {
    return kPositiveBound ? ptx::max_bits(x, y, z) : ptx::min_bits(x, y, z);
  };
  float chains[kThreadRows][kChains];
  CUTE_UNROLL
  for (int row = 0; row < kThreadRows; ++row) {
    chains[row][0] = scores(row, 0);
    chains[row][1] = scores(row, 1);
  }
  CUTE_UNROLL
  for (int column = kChains; column < cute::size<1>(scores); column += 2) {
    CUTE_UNROLL
    for (int row = 0; row < kThreadRows; ++row) {
      float& chain = chains[row][column / 2 % kChains];
      chain = extreme(chain, scores(row, column), scores(row, column + 1));
    }
  }
  CUTE_UNROLL
  for (int row = 0; row < kThreadRows; ++row) {
    values[row] = extreme(chains[row][0], chains[row][1], chains[row][1]);
  }
}

template <class Accumulators>
__device__ __forceinline__ void scale_rows(Accumulators& accumulators, const float (&factors)[kThreadRows]) {
  auto matrix = accumulator_matrix(accumulators);
  CUTE_UNROLL
  for (int row = 0; row < kThreadRows; ++row) {
    CUTE_UNROLL
    for (int column = 0; column < cute::size<1>(matrix); ++column) {
      matrix(row, column) *= factors[row];
    }
  }
}

// One for each row that a thread has a part in.
struct RowFlags {
  bool flags[kThreadRows];

  __device__ __forceinline__ bool& operator[](int row) { return flags[row]; }
  __device__ __forceinline__ bool operator[](int row) const { return flags[row]; }
  // Whether one is set in the warp.
  __device__ __forceinline__ bool any() const {
    bool some = false;
    CUTE_UNROLL
    for (bool flag : flags) {
      some |= flag;
    }
    return __any_sync(0xffffffff, some);
  }
};

// The state of the rows that a thread has a part in.
struct Softmax : SoftmaxRows<kThreadRows> {
  // How far scores may be above the maximum, in powers of two. Multiplying the output by exp(old - new
  // maximum) takes long, and need not be done as long as the probabilities stay well in the range of 16 bits.
  static constexpr float kSlack = 8.0f;
  static constexpr float kMostProbability = 256.0f;  // 2^kSlack

  // Which rows must get a new maximum, in two ways. Each goes by the row's own scores and what the row has
  // seen, so that its results do not depend on which rows it shares a warp with.

  // From the scores, without their maxima: those with a score more than kSlack powers of two above, and all
  // where that bound is not positive.
  template <class Matrix>
  __device__ __forceinline__ RowFlags exceeded_by_scores(const Matrix& scores, float scale_log2) const {
    float values[kThreadRows];
    scores_against<true>(scores, values);
    RowFlags exceeded;
    CUTE_UNROLL
    for (int row = 0; row < kThreadRows; ++row) {
      const float bound = fmaf(maximum[row], scale_log2, kSlack);
      exceeded[row] = !(bound > 0.0f) || values[row] * scale_log2 > bound;
    }
    return exceeded;
  }

  // From the sums of exponentiate_and_round(): if one is at most kMostProbability, so is each probability.
  __device__ __forceinline__ RowFlags exceeded_by_sums(const float (&sums)[kThreadRows]) const {
    RowFlags exceeded;
    CUTE_UNROLL
    for (int row = 0; row < kThreadRows; ++row) {
      exceeded[row] = !(sums[row] <= kMostProbability) || maximum[row] == -CUDART_INF_F;
    }
    return exceeded;
  }

  // Takes the thread's maxima of a block of scores into the state of the rows where some thread of the quad
  // wants it. Returns whether a maximum of the warp has risen; only then must the output be multiplied by
  // `factors`.
  __device__ __forceinline__ bool raise(const RowFlags& exceeded, const float (&block_maxima)[kThreadRows],
                                        float scale_log2, float (&factors)[kThreadRows]) {
    bool raised = false;
    CUTE_UNROLL
    for (int row = 0; row < kThreadRows; ++row) {
      const float highest = fmaxf(maximum[row], quad_max(block_maxima[row]));
      raised |= raise_row(row, quad_any(exceeded[row]) ? highest : maximum[row], scale_log2, factors[row]);
    }
    return __any_sync(0xffffffff, raised);
  }

  // The same where a score is far above its maximum.
  template <class Matrix>
  __device__ __forceinline__ bool raise_where_exceeded(const Matrix& scores, float scale_log2,
                                                       float (&factors)[kThreadRows]) {
    const RowFlags rows = exceeded_by_scores(scores, scale_log2);
    bool raised = false;
    if (rows.any()) {
      float maxima[kThreadRows];
      row_maxima(scores, maxima);
      raised = raise(rows, maxima, scale_log2, factors);
    }
    return raised;
  }

  // scores = exp(scale * (scores - maximum)), and takes them into the sums.
  template <class Matrix>
  __device__ __forceinline__ void exponentiate(Matrix& scores, float scale_log2) {
    CUTE_UNROLL
    for (int row = 0; row < kThreadRows; ++row) {
      const float shift = finite_maximum(row) * scale_log2;
      CUTE_UNROLL
      for (int column = 0; column < cute::size<1>(scores); ++column) {
        scores(row, column) = ptx::exp2_approx(fmaf(scores(row, column), scale_log2, -shift));
        sum[row] += scores(row, column);
      }
    }
  }

  // probabilities = exp(scale * (scores - maximum)) in 16 bits, and their sums over the thread's columns.
  template <class Scores, class Probabilities>
  __device__ __forceinline__ void exponentiate_and_round(const Scores& scores, Probabilities& probabilities,
                                                         float scale_log2, float (&sums)[kThreadRows]) const {
    using Element = typename Probabilities::value_type;
    auto pairs = cute::recast<uint32_t>(probabilities);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); i += 2) {  // both of one row
      const int row = i / 2 % kThreadRows;
      const float shift = finite_maximum(row) * scale_log2;
      cutlass::Array<float, 2> pair;
      CUTE_UNROLL
      for (int j = 0; j < 2; ++j) {
        pair[j] = ptx::exp2_approx(fmaf(scores(i + j), scale_log2, -shift));
      }
      sums[row] = i / 2 < kThreadRows ? pair[0] + pair[1] : sums[row] + (pair[0] + pair[1]);
      const auto rounded = cutlass::NumericArrayConverter<Element, float, 2>{}(pair);
      pairs(i / 2) = reinterpret_cast<const uint32_t&>(rounded);
    }
  }
};

}  // namespace bsfa::sm90
