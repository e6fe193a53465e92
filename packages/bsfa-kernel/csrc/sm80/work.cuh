// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// What a CTA of the forward kernel works on, and what becomes of it in the counts of kept blocks.
#pragma once

#include <math_constants.h>

#include "../common/mask.cuh"
#include "../common/schedule.cuh"
#include "../common/threshold.cuh"

namespace bsfa::sm80 {

// The tile of a CTA.
struct Tile {
  Sequence sequence;
  int head;
  int kv_head;
  int first_query;  // in its sequence
};

// A block of queries of the tile: all of it, or in geometry 64x64 a half.
struct QueryBlock {
  int index;  // in its sequence
  float threshold;
  KeyBlocks keys;
  int undecided;     // the key blocks [0, undecided) are voted on, [undecided, keys.visible) are kept
  int first_thread;  // of those that work on it; that one writes what follows, except last_kept
  int kept;          // number of key blocks kept, where votes are taken
  int last_kept;     // geometry 64x64: the last key block that a thread voted to keep
};

__device__ __forceinline__ bool is_poisoned(const QueryBlock& block) {
  return isnan(block.threshold);
}

__device__ __forceinline__ Tile find_tile(const ForwardParams& params, const Schedule& schedule,
                                          int tile_rows) {
  const Work work = find_work(schedule, blockIdx.x);
  if (params.cu_seqlens_q != nullptr) {
    const Sequence sequence = find_sequence(params, work.tile, tile_rows);
    const int place = work.tile - packed_place(params.cu_seqlens_q, sequence.index, tile_rows);
    return {sequence, work.kv_head * schedule.group + work.member, work.kv_head, place * tile_rows};
  }
  const int batch = work.kv_head / params.kv_heads;
  const int kv_head = work.kv_head % params.kv_heads;
  return {{batch, 0, 0, params.seqlen_q, params.seqlen_k},
          kv_head * schedule.group + work.member,
          kv_head,
          work.tile * tile_rows};
}

__device__ __forceinline__ QueryBlock find_query_block(const ForwardParams& params, const Tile& tile,
                                                       int half) {
  const Visibility sees{tile.sequence.seqlen_q, tile.sequence.seqlen_k, params.causal};
  const int first_query = tile.first_query + half * params.q_block;
  const int row =
      threshold_row(first_query, sees.seqlen_q, sees.seqlen_k, params.q_block, params.threshold_rows);
  QueryBlock block;
  block.index = first_query / params.q_block;
  block.threshold = params.thresholds[int64_t{tile.head} * params.threshold_rows + row];
  block.keys = is_poisoned(block) ? KeyBlocks{0, 0} : key_blocks(sees, first_query, params.q_block);
  block.undecided = block.threshold == -CUDART_INF_F ? 0 : block.keys.full;
  block.first_thread = threadIdx.x;
  block.kept = 0;
  block.last_kept = -1;
  return block;
}

// The element (first row, 0) of a sequence's rows of a head.
const __device__ __forceinline__ uint16_t* first_element(const void* tensor, const Strides& strides,
                                                         const Sequence& sequence, int row, int head) {
  return static_cast<const uint16_t*>(tensor) + sequence.index * strides.batch + row * strides.seqlen +
         head * strides.heads;
}

// Number of key blocks that a block of queries kept. In packed tensors the columns of a sequence can be more
// than its blocks; the CTA at the sequence's last place sets the others to 0.
__device__ __forceinline__ int32_t* kept_of_block(const ForwardParams& params, const Tile& tile, int index) {
  if (params.cu_seqlens_q != nullptr) {
    const int columns = params.seqlen_q / params.q_block + params.batch;
    return params.kept + int64_t{tile.head} * columns +
           packed_place(params.cu_seqlens_q, tile.sequence.index, params.q_block) + index;
  }
  const int blocks = (params.seqlen_q + params.q_block - 1) / params.q_block;
  return params.kept + (int64_t{tile.sequence.index} * params.heads + tile.head) * blocks + index;
}

__device__ __forceinline__ void clear_spare_kept(const ForwardParams& params, const Tile& tile,
                                                 int tile_rows) {
  const int32_t* starts = params.cu_seqlens_q;
  const int next = tile.sequence.index + 1;
  const int last_tile = starts[next] / tile_rows - starts[next - 1] / tile_rows;
  if (tile.first_query != last_tile * tile_rows) {
    return;
  }
  const int columns = starts[next] / params.q_block - starts[next - 1] / params.q_block + 1;
  const int blocks = (tile.sequence.seqlen_q + params.q_block - 1) / params.q_block;
  for (int index = blocks + threadIdx.x; index < columns; index += blockDim.x) {
    *kept_of_block(params, tile, index) = 0;
  }
}

__device__ __forceinline__ int64_t first_element(const Strides& strides, const Sequence& sequence,
                                                 int first_row, int head) {
  return sequence.index * strides.batch + first_row * strides.seqlen + head * strides.heads;
}

}  // namespace bsfa::sm80
