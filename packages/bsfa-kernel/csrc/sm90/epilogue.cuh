// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// A consumer warpgroup's results: output, log-sum-exp and the number of blocks kept.
#pragma once

#include "../common/sink.cuh"
#include "consumer.cuh"

namespace bsfa::sm90 {

// Each of the four threads of a quad has a row of a 4 x 4 matrix, and gets a column.
__device__ __forceinline__ void transpose_in_quad(uint32_t (&words)[4]) {
  CUTE_UNROLL
  for (int distance = 1; distance < 4; distance *= 2) {
    const bool is_upper = (threadIdx.x & distance) != 0;
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      if ((i & distance) == 0) {
        uint32_t& lower = words[i];
        uint32_t& upper = words[i + distance];
        const uint32_t other = __shfl_xor_sync(0xffffffff, is_upper ? lower : upper, distance);
        lower = is_upper ? other : lower;
        upper = is_upper ? upper : other;
      }
    }
  }
}

// The threads of a pair have two neighbouring columns each of two groups, and get four of one: the even
// thread of the lower group, the odd one of the upper.
__device__ __forceinline__ uint2 swap_in_pair(uint32_t lower, uint32_t upper) {
  const bool is_odd = threadIdx.x % 2 != 0;
  const uint32_t other = __shfl_xor_sync(0xffffffff, is_odd ? lower : upper, 1);
  return {is_odd ? other : lower, is_odd ? upper : other};
}

// Normalises and writes the rows of the warpgroup that exist, and nothing else.
template <class Config, class Context, class Output>
__device__ __forceinline__ void store_output(const Context& context, Output& output, const Softmax& softmax) {
  using namespace cute;
  using Element = typename Config::Element;
  const ForwardParams& params = context.params;
  const Sequence& sequence = context.tile.sequence;
  const ConsumerThread who = context.who;
  const auto exists = [&](int row) { return sequence.has_query(context.first_query() + who.row(row)); };

  const float sink = sink_of(params, context.tile.head);
  float factors[kThreadRows];
  CUTE_UNROLL
  for (int row = 0; row < kThreadRows; ++row) {
    const float sum = is_poisoned(context.block) ? CUDART_NAN_F : quad_sum(softmax.sum[row]);
    const RowResult result = finish_row(params.scale * softmax.maximum[row], sum, sink);
    factors[row] = result.factor;
    if (params.lse != nullptr && who.thread % 4 == 0 && exists(row)) {
      const int64_t line = lse_line(params, context.tile);
      params.lse[line * params.seqlen_q + sequence.first_q + context.first_query() + who.row(row)] =
          result.lse;
    }
  }
  scale_rows(output, factors);
  auto rounded = make_tensor_like<Element>(output);
  round_to(rounded, output);

  const auto words = recast<uint32_t>(rounded);  // (row of the thread, pair of columns), the row first
  const Strides& strides = params.out_strides;
  Element* out = find_row(static_cast<Element*>(params.out), params.out_strides, sequence,
                          query_row(sequence, context.first_query()), context.tile.head);
  // The threads of a quad have two of each eight columns, a group.
  constexpr int kGroup = 8;
  CUTE_UNROLL
  for (int row = 0; row < kThreadRows; ++row) {
    const int columns = exists(row) ? params.head_dim : 0;
    if constexpr (Config::kShortEnds) {
      // Pairs swap, so that a quad writes 32 bytes of a row at a time, a sector where rows are aligned to
      // one.
      const int first_column = who.thread % 2 * kGroup + who.thread % 4 / 2 * 4;
      Element* line = out + who.row(row) * strides.seqlen + first_column;
      CUTE_UNROLL
      for (int group = 0; group < Config::kHeadDim / kGroup; group += 2) {
        const uint2 swapped =
            swap_in_pair(words(row + kThreadRows * group), words(row + kThreadRows * (group + 1)));
        if (group * kGroup + first_column < columns) {
          *reinterpret_cast<uint2*>(line + group * kGroup) = swapped;
        }
      }
    } else {
      // The quad swaps, so that each thread has every fourth group.
      CUTE_UNROLL
      for (int group = 0; group < Config::kHeadDim / kGroup; group += 4) {
        uint32_t swapped[4];
        CUTE_UNROLL
        for (int i = 0; i < 4; ++i) {
          swapped[i] = words(row + kThreadRows * (group + i));
        }
        transpose_in_quad(swapped);
        if ((group + who.thread % 4) * kGroup < columns) {
          *reinterpret_cast<uint4*>(out + who.row(row) * strides.seqlen + (group + who.thread % 4) * kGroup) =
              uint4{swapped[0], swapped[1], swapped[2], swapped[3]};
        }
      }
    }
  }
}

// Writes what is asked for of a tile.
template <class Config, class Context, class Output>
__device__ __forceinline__ void store_results(const Context& context, Output& output, const Softmax& softmax,
                                              int kept) {
  const ForwardParams& params = context.params;
  const ConsumerThread who = context.who;
  const bool reports = params.kept != nullptr && who.thread == 0;
  if (reports && params.has_spare_blocks() && who.warpgroup == 0) {
    clear_spare_kept(params, context.tile, Config::kTileQ, 0, 1);
  }
  if (!context.tile.exists()) {
    return;
  }
  store_output<Config>(context, output, softmax);
  if (reports && context.block.exists && (who.warpgroup == 0 || params.q_block < Config::kTileQ)) {
    *kept_of_block(params, context.tile, context.block.index) = kept;
  }
}

}  // namespace bsfa::sm90
