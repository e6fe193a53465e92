// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// A consumer warpgroup's results: output, log-sum-exp and the number of blocks kept.
#pragma once

#include <cute/arch/copy_sm90.hpp>

#include "consumer.cuh"

namespace bsfa::sm90 {

// Normalises and writes the rows of the warpgroup that exist, and nothing else.
template <class Config, class Output>
__device__ __forceinline__ void store_output(const TileContext<Config>& context, Output& output,
                                             const Softmax& softmax) {
  using namespace cute;
  using Element = typename Config::Element;
  const ForwardParams& params = context.params;
  const Sequence& sequence = context.tile.sequence;
  const ConsumerThread who = context.who;
  const int rows = sequence.seqlen_q - context.first_query();

  float factors[kThreadRows];
  CUTE_UNROLL
  for (int row = 0; row < kThreadRows; ++row) {
    const float sum = is_poisoned(context.block) ? CUDART_NAN_F : quad_sum(softmax.sum[row]);
    factors[row] = sum == 0.0f ? 0.0f : 1.0f / sum;
    if (params.lse != nullptr && who.thread % 4 == 0 && who.row(row) < rows) {
      const bool packed = params.cu_seqlens_q != nullptr;
      const int64_t line =
          packed ? context.tile.head : int64_t{sequence.index} * params.heads + context.tile.head;
      params.lse[line * params.seqlen_q + sequence.first_q + context.first_query() + who.row(row)] =
          sum == 0.0f ? -CUDART_INF_F : params.scale * softmax.maximum[row] + logf(sum);
    }
  }
  scale_rows(output, factors);
  auto rounded = make_tensor_like<Element>(output);
  round_to(rounded, output);

  const auto staging =
      make_tensor(make_smem_ptr(context.storage.out), typename Config::SmemQ{})(_, _, who.warpgroup);
  typename Config::ValuesMma values_mma;
  const auto copy_out = make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, Element>{}, values_mma);
  const auto copy_slice = copy_out.get_thread_slice(who.thread);
  auto to = copy_slice.partition_D(staging);
  sync(NamedBarrier::kStage0, who.warpgroup, 128);  // the last tile's rows have been read
  copy(copy_out, copy_slice.retile_S(rounded), to);
  sync(NamedBarrier::kStage0, who.warpgroup, 128);

  constexpr int kChunk = 16 / sizeof(Element);
  constexpr int kThreadsOfRow = Config::kHeadDim / kChunk;
  const int column = who.thread % kThreadsOfRow * kChunk;
  const Strides& strides = params.out_strides;
  Element* out = static_cast<Element*>(params.out) + context.tile.batch_coordinate(params) * strides.batch +
                 (sequence.first_q + context.first_query()) * strides.seqlen +
                 context.tile.head * strides.heads;
  CUTE_UNROLL
  for (int row = who.thread / kThreadsOfRow; row < Config::kWarpgroupQ; row += 128 / kThreadsOfRow) {
    if (row < rows) {
      *reinterpret_cast<uint4*>(out + row * strides.seqlen + column) =
          *reinterpret_cast<const uint4*>(raw_pointer_cast(&staging(row, column)));
    }
  }
}

// Number of key blocks that a block of queries kept.
__device__ __forceinline__ int32_t* kept_of_block(const ForwardParams& params, const Tile& tile, int index) {
  if (params.cu_seqlens_q != nullptr) {
    const int columns = params.seqlen_q / params.q_block + params.batch;
    return params.kept + int64_t{tile.head} * columns +
           packed_place(params.cu_seqlens_q, tile.sequence.index, params.q_block) + index;
  }
  const int blocks = (params.seqlen_q + params.q_block - 1) / params.q_block;
  return params.kept + (int64_t{tile.sequence.index} * params.heads + tile.head) * blocks + index;
}

// In packed tensors a sequence can have more columns of `kept` than blocks of queries. Who has its last place
// sets the others to 0. Called by one thread.
__device__ __forceinline__ void clear_spare_kept(const ForwardParams& params, const Tile& tile, int tile_q) {
  const int32_t* starts = params.cu_seqlens_q;
  const int next = tile.sequence.index + 1;
  const int last_tile = starts[next] / tile_q - starts[next - 1] / tile_q;
  if (tile.first_query != last_tile * tile_q) {
    return;
  }
  const int columns = starts[next] / params.q_block - starts[next - 1] / params.q_block + 1;
  const int blocks = (tile.sequence.seqlen_q + params.q_block - 1) / params.q_block;
  for (int index = blocks; index < columns; ++index) {
    *kept_of_block(params, tile, index) = 0;
  }
}

}  // namespace bsfa::sm90
