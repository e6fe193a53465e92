// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The online softmax over accumulators of mma.sync, in which the four threads of a quad share a row.
#pragma once

#include <math_constants.h>

#include "../common/ptx.cuh"
#include "../common/quad.cuh"
#include "../common/softmax_rows.cuh"

namespace bsfa::sm80 {

// The largest score of each of the thread's rows among the thread's columns, or NaN.
template <class Matrix, int kRows>
__device__ __forceinline__ void row_maxima(Matrix& scores, float (&maxima)[kRows]) {
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    maxima[row] = -CUDART_INF_F;
#pragma unroll
    for (int column = 0; column < Matrix::kColumns; ++column) {
      maxima[row] = ptx::max_nan(maxima[row], scores(row, column));
    }
  }
}

// The state of the rows that a thread has a part in.
template <int kRows>
struct Softmax : SoftmaxRows<kRows> {
  using SoftmaxRows<kRows>::finite_maximum;
  using SoftmaxRows<kRows>::maximum;
  using SoftmaxRows<kRows>::sum;

  // Takes the thread's maxima of a block of scores into the state, which is then relative to the new maxima.
  // Returns whether a maximum of the warp has risen; only then must the output be multiplied by `factors`.
  __device__ __forceinline__ bool raise(const float (&block_maxima)[kRows], float scale_log2,
                                        float (&factors)[kRows]) {
    bool raised = false;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float highest = fmaxf(maximum[row], quad_max(block_maxima[row]));
      raised |= this->raise_row(row, highest, scale_log2, factors[row]);
    }
    return __any_sync(0xffffffff, raised);
  }

  // scores = exp(scale * (scores - maximum)), and takes them into the sums.
  template <class Matrix>
  __device__ __forceinline__ void exponentiate(Matrix& scores, float scale_log2) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float shift = finite_maximum(row) * scale_log2;
#pragma unroll
      for (int column = 0; column < Matrix::kColumns; ++column) {
        scores(row, column) = ptx::exp2_approx(fmaf(scores(row, column), scale_log2, -shift));
        sum[row] += scores(row, column);
      }
    }
  }
};

}  // namespace bsfa::sm80
