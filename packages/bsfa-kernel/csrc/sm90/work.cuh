// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The work on a tile of 128 queries. Each producer finds it; the one that loads Q
// publishes it to the consumers.
#pragma once

#include "../common/query_block.cuh"
#include "tensor_map.hpp"

namespace bsfa::sm90 {

struct KernelParams : TensorMaps {
  ForwardParams forward;
  Schedule schedule;
  int tiles;  // of all heads and sequences
};

// The block of queries that a consumer belongs to.
struct ConsumerBlock : QueryBlock {
  bool exists;
};

__device__ __forceinline__ ConsumerBlock find_consumer_block(const ForwardParams& params,
                                                             const Sequence& sequence, int head,
                                                             int first_query) {
  return {find_query_block(params, sequence, head, first_query),
          sequence.has_query_in(first_query, params.q_block)};
}

struct Tile : QueryTile {
  ConsumerBlock first;   // of consumer 0
  ConsumerBlock second;  // of consumer 1; the same where the geometry is 128x64
  int key_blocks;        // visited, from the last to the first; a multiple of a dense step
  int full;              // key blocks [0, full) hold no masked score
  bool dense;            // nothing to vote on

  // Member by member: choosing between whole structs would put them into local memory.
  __device__ __forceinline__ ConsumerBlock block_of(int consumer) const {
    const bool is_first = consumer == 0;
    return {
        {is_first ? first.index : second.index,
         is_first ? first.threshold : second.threshold,
         {is_first ? first.keys.visible : second.keys.visible, is_first ? first.keys.full : second.keys.full},
         is_first ? first.undecided : second.undecided},
        is_first ? first.exists : second.exists};
  }
};

// The tile's sequence, head and queries. find_blocks() must follow, for the rest.
__device__ __forceinline__ void place_tile(const ForwardParams& params, const Schedule& schedule, int index,
                                           int tile_q, Tile& tile) {
  static_cast<QueryTile&>(tile) = find_tile(params, schedule, index, tile_q);
}

// The tile's query blocks and key blocks, which depend on the thresholds. A dense step takes kStepBlocks.
template <int kStepBlocks>
__device__ __forceinline__ void find_blocks(const ForwardParams& params, int tile_q, Tile& tile) {
  tile.first = find_consumer_block(params, tile.sequence, tile.head, tile.first_query);
  tile.second = params.q_block < tile_q
                    ? find_consumer_block(params, tile.sequence, tile.head, tile.first_query + params.q_block)
                    : tile.first;
  const int visible = max(tile.first.keys.visible, tile.second.keys.visible);
  tile.key_blocks = (visible + kStepBlocks - 1) / kStepBlocks * kStepBlocks;
  const auto counts = [](const ConsumerBlock& block) { return block.exists && !is_poisoned(block); };
  tile.full = !counts(tile.first)   ? tile.second.keys.full
              : counts(tile.second) ? min(tile.first.keys.full, tile.second.keys.full)
                                    : tile.first.keys.full;
  tile.dense = max(tile.first.undecided, tile.second.undecided) == 0;
}

}  // namespace bsfa::sm90
