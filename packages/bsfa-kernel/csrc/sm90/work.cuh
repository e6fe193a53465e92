// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// What there is to do for a tile of 128 queries. The two loaders work it out; the consumers are told.
#pragma once

#include <cuda.h>
#include <math_constants.h>

#include "../common/mask.cuh"
#include "../common/schedule.cuh"
#include "../common/threshold.cuh"

namespace bsfa::sm90 {

struct KernelParams {
  CUtensorMap q, k, v;  // (column, row, head, batch)
  ForwardParams forward;
  Schedule schedule;
  int tiles;  // of all heads and sequences
};

// The block of queries that a consumer warpgroup belongs to.
struct QueryBlock {
  int index;  // in its sequence
  float threshold;
  KeyBlocks keys;
  int undecided;  // the key blocks [0, undecided) are voted on, [undecided, keys.visible) are kept
  bool exists;
};

__device__ __forceinline__ bool is_poisoned(const QueryBlock& block) {
  return isnan(block.threshold);
}

struct Tile {
  Sequence sequence;
  int head;
  int kv_head;
  int first_query;    // in its sequence
  QueryBlock first;   // of consumer 0
  QueryBlock second;  // of consumer 1; the same where the geometry is 128x64
  int key_blocks;     // visited, from the last to the first; even
  int full;           // key blocks [0, full) hold no masked score
  bool dense;         // nothing to vote on

  __device__ __forceinline__ int batch_coordinate(const ForwardParams& params) const {
    return params.cu_seqlens_q != nullptr ? 0 : sequence.index;
  }
  __device__ __forceinline__ bool exists() const { return first_query < sequence.seqlen_q; }

  // Member by member: a choice between the two as wholes would put them into local memory.
  __device__ __forceinline__ QueryBlock block_of(int consumer) const {
    const bool is_first = consumer == 0;
    return {
        is_first ? first.index : second.index,
        is_first ? first.threshold : second.threshold,
        {is_first ? first.keys.visible : second.keys.visible, is_first ? first.keys.full : second.keys.full},
        is_first ? first.undecided : second.undecided,
        is_first ? first.exists : second.exists};
  }
};

__device__ __forceinline__ QueryBlock find_query_block(const ForwardParams& params, const Sequence& sequence,
                                                       int head, int first_query) {
  const Visibility sees{sequence.seqlen_q, sequence.seqlen_k, params.causal};
  QueryBlock block;
  block.index = first_query / params.q_block;
  block.exists = first_query < sees.seqlen_q;
  const int row =
      threshold_row(first_query, sees.seqlen_q, sees.seqlen_k, params.q_block, params.threshold_rows);
  // By a plain load: __ldg is for what nobody writes while the kernel lives, and it may begin before the one
  // that writes the thresholds has ended.
  block.threshold =
      block.exists ? params.thresholds[int64_t{head} * params.threshold_rows + row] : -CUDART_INF_F;
  block.keys = is_poisoned(block) ? KeyBlocks{0, 0} : key_blocks(sees, first_query, params.q_block);
  block.undecided = block.threshold == -CUDART_INF_F ? 0 : block.keys.full;
  return block;
}

// Whose tile it is: the members up to the first query. The others are find_blocks()'s, which must follow. No
// memory is read unless sequences are packed.
__device__ __forceinline__ void place_tile(const ForwardParams& params, const Schedule& schedule, int index,
                                           int tile_q, Tile& tile) {
  const Work work = find_work(schedule, index);
  if (params.cu_seqlens_q != nullptr) {
    tile.sequence = find_sequence(params, work.tile, tile_q);
    tile.kv_head = work.kv_head;
    tile.first_query = (work.tile - packed_place(params.cu_seqlens_q, tile.sequence.index, tile_q)) * tile_q;
  } else {
    tile.sequence = {work.kv_head / params.kv_heads, 0, 0, params.seqlen_q, params.seqlen_k};
    tile.kv_head = work.kv_head % params.kv_heads;
    tile.first_query = work.tile * tile_q;
  }
  tile.head = tile.kv_head * schedule.group + work.member;
}

// What is to be done for it, which depends on the thresholds.
__device__ __forceinline__ void find_blocks(const ForwardParams& params, int tile_q, Tile& tile) {
  tile.first = find_query_block(params, tile.sequence, tile.head, tile.first_query);
  tile.second = params.q_block < tile_q
                    ? find_query_block(params, tile.sequence, tile.head, tile.first_query + params.q_block)
                    : tile.first;
  const int visible = max(tile.first.keys.visible, tile.second.keys.visible);
  tile.key_blocks = (visible + 1) / 2 * 2;
  const bool second_counts = tile.second.exists && !is_poisoned(tile.second);
  tile.full = is_poisoned(tile.first) ? tile.second.keys.full
              : second_counts         ? min(tile.first.keys.full, tile.second.keys.full)
                                      : tile.first.keys.full;
  tile.dense = max(tile.first.undecided, tile.second.undecided) == 0;
}

// Runs `body` for the index of each tile of this CTA, in the order of the schedule. Every other round goes
// backwards through the CTAs, so that none of them gets the longest tile of every round.
template <class Config, class Body>
__device__ __forceinline__ void for_each_tile(const KernelParams& params, Body&& body) {
  const int rounds = (params.tiles + gridDim.x - 1) / gridDim.x;
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    const int place = round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    const int index = round * gridDim.x + place;
    if (index < params.tiles) {
      body(index);
    }
  }
}

template <class Config>
__device__ __forceinline__ int count_tiles(const KernelParams& params) {
  int count = 0;
  for_each_tile<Config>(params, [&](int) { ++count; });
  return count;
}

}  // namespace bsfa::sm90
