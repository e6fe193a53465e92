// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// How voting rows are packed into the operands of the selection kernels, and what there is to do for a tile
// of them.
#pragma once

#include <cuda_runtime.h>
#include <math_constants.h>

#include "../check.hpp"
#include "layout.cuh"
#include "mask.cuh"
#include "threshold.cuh"

namespace bsfa {

// A slot: 16 voting rows of one query block, the rows of one warp in one operand.
inline constexpr int kSlotRows = 16;

// The slots of a sequence, one query block after another. In the last query block every row votes. `rows`: of
// a sequence, its queries and those before them that the first query block lacks.
struct SlotList {
  int q_block;
  int voters;
  int slots_of_tile;  // what a CTA takes at a time

  __host__ __device__ int slots_of_block() const { return q_block / voters / kSlotRows; }
  __host__ __device__ int slots(int rows) const {
    const int last_block = (rows - 1) / q_block;  // 0 where there is none: -1 / q_block
    const int last_rows = rows - last_block * q_block;
    return last_block * slots_of_block() + (last_rows + kSlotRows - 1) / kSlotRows;
  }
  __host__ __device__ int tiles(int rows) const { return (slots(rows) + slots_of_tile - 1) / slots_of_tile; }
  // Queries of a full tile.
  __host__ __device__ int tile_queries() const { return slots_of_tile * kSlotRows * voters; }
  // Tiles that a sequence can need beyond its length over tile_queries(): one for either end, one for the
  // last query block.
  __host__ __device__ int spare() const { return voters == 1 ? 2 : 3; }
};

__device__ __forceinline__ int slot_rows(const Sequence& sequence, int q_block) {
  return sequence.seqlen_q == 0 ? 0 : sequence.seqlen_q + sequence.lead(q_block);
}

// How many tiles are set aside for each head: of one sequence, or (packed) of all.
inline int count_select_tiles(const SelectParams& params, int slots_of_tile) {
  const SlotList list{params.q_block, params.voters, slots_of_tile};
  if (params.has_spare_blocks()) {
    return params.seqlen_q / list.tile_queries() + list.spare() * (params.packs_queries() ? params.batch : 1);
  }
  return list.tiles(params.seqlen_q + ((params.seqlen_k - params.seqlen_q) & (params.q_block - 1)));
}

// The schedule of a call; `key_bytes` of each key and kv head are read.
inline Schedule make_select_schedule(const SelectParams& params, int slots_of_tile, int64_t key_bytes) {
  return make_schedule(params, count_select_tiles(params, slots_of_tile), key_bytes);
}

struct SelectTile {
  Sequence sequence;
  int head;
  int kv_head;
  int first_slot;  // negative in the first tile of a sequence whose slots do not fill its tiles
  bool exists;
};

// The tile at `index` of the schedule.
__device__ __forceinline__ SelectTile find_select_tile(const SelectParams& params, const Schedule& schedule,
                                                       int index, int slots_of_tile) {
  const Work work = find_work(schedule, index);
  const SlotList list{params.q_block, params.voters, slots_of_tile};
  SelectTile tile;
  int place = work.tile;
  int set_aside = schedule.tiles;
  if (params.packs_queries()) {
    tile.sequence = find_packed_sequence(params, work.tile, list.tile_queries(), list.spare());
    tile.kv_head = work.kv_head;
    const auto first_of = [&](int index) {
      return packed_tile(params.cu_seqlens_q, index, list.tile_queries(), list.spare());
    };
    place -= first_of(tile.sequence.index);
    set_aside = first_of(tile.sequence.index + 1) - first_of(tile.sequence.index);
  } else {
    tile.sequence = find_sequence(params, work.kv_head / params.kv_heads);
    tile.kv_head = work.kv_head % params.kv_heads;
  }
  tile.head = tile.kv_head * schedule.group + work.member;
  // The last tile is full; where causal, it is the longest.
  const int rows = slot_rows(tile.sequence, params.q_block);
  const int tiles = list.tiles(rows);
  const int number = tile_at(place, set_aside, tiles);
  tile.first_slot = list.slots(rows) - (tiles - number) * slots_of_tile;
  tile.exists = number < tiles;
  return tile;
}

struct Slot {
  int block;        // the query block, in its sequence
  int first_query;  // of row 0; row i is first_query + i * step, and need not exist
  int step;
  float threshold;
  KeyBlocks keys;  // of the query block
  bool exists;

  __device__ __forceinline__ int query(int row) const { return first_query + row * step; }
  // Whether the verdicts on its unforced blocks depend on scores.
  __device__ __forceinline__ bool has_finite_threshold() const {
    return exists && fabsf(threshold) < CUDART_INF_F;
  }
};

__device__ __forceinline__ Slot find_slot(const SelectParams& params, const SelectTile& tile, int index) {
  const int slots_of_block = params.q_block / params.voters / kSlotRows;
  const Sequence& sequence = tile.sequence;
  const int slot = max(tile.first_slot + index, 0);
  const int last_block = sequence.blocks(params.q_block) - 1;
  Slot result;
  result.exists = tile.first_slot + index >= 0;
  result.block = min(slot / slots_of_block, last_block);
  const int in_block = slot - result.block * slots_of_block;
  result.step = result.block == last_block ? 1 : params.voters;
  const int first_query = result.block * params.q_block - sequence.lead(params.q_block);
  result.first_query = first_query + in_block * kSlotRows * result.step + result.step - 1;
  const int row =
      threshold_row(first_query, sequence.seqlen_q, sequence.seqlen_k, params.q_block, params.threshold_rows);
  // Not __ldg: under PDL the producer of `thresholds` may still be running.
  result.threshold = params.thresholds[int64_t{tile.head} * params.threshold_rows + row];
  const Visibility sees{sequence.seqlen_q, sequence.seqlen_k, params.causal};
  result.keys = key_blocks(sees, first_query, params.q_block);
  return result;
}

// What is to be done for a tile. The same in all lanes of a warp, all of which must come.
struct SelectWork {
  bool votes;      // some query block has something to vote on
  bool oversized;  // the call or the mask has no room for all keys of the sequence
  int key_tiles;   // visited, of two key blocks each, from the last to the first
  int full;        // the key blocks [0, full) hold no score that is masked in the tile
};

__device__ __forceinline__ SelectWork find_select_work(const SelectParams& params, const SelectTile& tile,
                                                       int slots_of_tile, int lane) {
  const Slot slot = find_slot(params, tile, lane % slots_of_tile);
  SelectWork work;
  const int key_blocks = (tile.sequence.seqlen_k + kKeyBlock - 1) / kKeyBlock;
  // No branch: behind one, ptxas does not see that a warp's lanes go through the key tiles together, and
  // keeps the operands' descriptors in registers of each lane.
  work.oversized = tile.sequence.oversized | (key_blocks > params.mask_words * kMaskBits);
  work.votes = __any_sync(0xffffffff, slot.has_finite_threshold() && slot.keys.full > 0) && !work.oversized;
  work.key_tiles = (__shfl_sync(0xffffffff, slot.keys.visible, slots_of_tile - 1) + 1) / 2;
  work.full =
      __shfl_sync(0xffffffff, slot.keys.full, 0);  // of the sequence's first block, if it does not exist
  return work;
}

// Sets the bits [first, end) of a query block. All lanes of a warp come.
__device__ __forceinline__ void set_blocks(uint64_t* words, int first, int end, int lane) {
  for (int word = first / kMaskBits + lane; word * kMaskBits < end; word += 32) {
    const int low = max(first - word * kMaskBits, 0);
    const int high = min(end - word * kMaskBits, kMaskBits);
    const unsigned long long bits = ~0ull >> (kMaskBits - high) & ~0ull << low;
    atomicOr(reinterpret_cast<unsigned long long*>(words + word), bits);
  }
}

// Writes the verdicts on a slot's query block that follow from its threshold: the forced blocks, or all. All
// lanes of a warp come.
__device__ __forceinline__ void fill_slot(const SelectParams& params, const SelectTile& tile,
                                          const Slot& slot, const SelectWork& work, int lane) {
  if (!slot.exists) {
    return;
  }
  const int first = slot.threshold == CUDART_INF_F && !work.oversized ? slot.keys.full : 0;
  const int end = work.oversized ? params.mask_words * kMaskBits : slot.keys.visible;
  set_blocks(
      words_of_block(params, params.block_mask, params.mask_words, tile.sequence, tile.head, slot.block),
      first, end, lane);
}

// Clears the whole mask. Returns whether there is something to select.
inline bool clear_block_mask(const SelectParams& params, cudaStream_t stream) {
  const int64_t rows = int64_t{params.packs_queries() ? 1 : params.batch} * params.heads;
  const int64_t words = rows * params.query_blocks(params.q_block) * params.mask_words;
  if (words == 0) {
    return false;
  }
  BSFA_CUDA_CHECK(cudaMemsetAsync(params.block_mask, 0, words * sizeof(uint64_t), stream));
  return params.seqlen_q > 0 && params.seqlen_k > 0;
}

}  // namespace bsfa
