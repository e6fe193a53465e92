// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// Where sequences, tiles of queries, key blocks and results lie: in padded and in packed tensors and in
// pages. Nothing else knows of cu_seqlens, seqused_k and block_table.
#pragma once

#include <cstdint>

#include "../params.hpp"
#include "schedule.cuh"

namespace bsfa {

// One sequence and where it lies in the tensors.
struct Sequence {
  int index;    // in the batch
  int first_q;  // row of its first query in packed tensors, else 0
  int first_k;
  int seqlen_q;
  int seqlen_k;
  bool oversized;  // more keys than the call has room for: its outputs are NaN, and seqlen_k says only where
                   // query blocks begin

  // Blocks of `rows` queries, a power of two up to 128, begin at absolute multiples of it: this many rows of
  // the first one come before query 0.
  __device__ __forceinline__ int lead(int rows) const { return (seqlen_k - seqlen_q) & (rows - 1); }
  // How many such blocks there are.
  __device__ __forceinline__ int blocks(int rows) const {
    return seqlen_q == 0 ? 0 : (seqlen_q + lead(rows) + rows - 1) / rows;
  }
  // The number of the one that begins at query `first`, which is below 0 where the block is cut.
  __device__ __forceinline__ int block_at(int first, int rows) const { return (first + lead(rows)) / rows; }
  __device__ __forceinline__ bool has_query(int query) const {
    return static_cast<unsigned>(query) < static_cast<unsigned>(seqlen_q);
  }
  // Whether there is some query of `rows` from `first`.
  __device__ __forceinline__ bool has_query_in(int first, int rows) const {
    return max(first, 0) < min(first + rows, seqlen_q);
  }
};

// A tile of queries of one head.
struct QueryTile {
  Sequence sequence;
  int head;
  int kv_head;
  int first_query;  // in its sequence; below 0 where the first tile is cut

  __device__ __forceinline__ bool exists() const { return max(first_query, 0) < sequence.seqlen_q; }
};

// How many blocks or tiles of queries are set aside for a packed sequence beyond its length over their rows:
// one for each end, as in Problem::query_blocks().
inline constexpr int kSpareBlocks = 2;

// Where the tiles (or blocks) of sequence `index` begin among those of all packed sequences, when each holds
// `rows` rows. `spare` more than its length over `rows` are set aside for a sequence.
__device__ __forceinline__ int packed_tile(const int32_t* cu_seqlens, int index, int rows, int spare) {
  return cu_seqlens[index] / rows + spare * index;
}

// The index of the packed sequence that a tile belongs to.
__device__ __forceinline__ int find_packed(const int32_t* cu_seqlens, int batch, int tile, int tile_rows,
                                           int spare) {
  int low = 0;
  int high = batch;  // packed_tile(low) <= tile < packed_tile(high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (packed_tile(cu_seqlens, middle, tile_rows, spare) <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The sequence number `index`.
__device__ __forceinline__ Sequence find_sequence(const Problem& problem, int index) {
  Sequence sequence{index, 0, 0, problem.seqlen_q, problem.seqlen_k, false};
  if (problem.packs_queries()) {
    sequence.first_q = problem.cu_seqlens_q[index];
    sequence.seqlen_q = problem.cu_seqlens_q[index + 1] - sequence.first_q;
  }
  if (problem.packs_keys()) {
    sequence.first_k = problem.cu_seqlens_k[index];
    sequence.seqlen_k = problem.cu_seqlens_k[index + 1] - sequence.first_k;
  } else if (problem.seqused_k != nullptr) {
    const int used = max(problem.seqused_k[index], 0);
    sequence.oversized = used > problem.seqlen_k;
    sequence.seqlen_k = sequence.oversized ? used % 128 : used;
  }
  return sequence;
}

// The sequence that tile `tile` of packed queries belongs to.
__device__ __forceinline__ Sequence find_packed_sequence(const Problem& problem, int tile, int tile_rows,
                                                         int spare) {
  return find_sequence(problem, find_packed(problem.cu_seqlens_q, problem.batch, tile, tile_rows, spare));
}

// How many tiles (or blocks) of `rows` queries are set aside for a sequence.
__device__ __forceinline__ int set_aside(const Problem& problem, const Sequence& sequence, int rows) {
  if (!problem.packs_queries()) {
    return problem.query_blocks(rows);
  }
  const int32_t* starts = problem.cu_seqlens_q + sequence.index;
  return packed_tile(starts, 1, rows, kSpareBlocks) - packed_tile(starts, 0, rows, kSpareBlocks);
}

// The number of the tile at `place` of the `places` that are set aside for a sequence that has `tiles`.
// Numbers from there on, which hold no query, come first: there the schedule has short tiles. Behind the last
// tile, which is the longest where causal, they would leave some CTAs with less to do than others.
__device__ __forceinline__ int tile_at(int place, int places, int tiles) {
  const int number = place + tiles - places;
  return number < 0 ? number + places : number;
}

// The tile at `index` of the schedule. No memory is read unless queries are packed or seqused_k is there.
__device__ __forceinline__ QueryTile find_tile(const Problem& problem, const Schedule& schedule, int index,
                                               int tile_rows) {
  const Work work = find_work(schedule, index);
  QueryTile tile;
  int place = work.tile;
  if (problem.packs_queries()) {
    tile.sequence = find_packed_sequence(problem, work.tile, tile_rows, kSpareBlocks);
    tile.kv_head = work.kv_head;
    place -= packed_tile(problem.cu_seqlens_q, tile.sequence.index, tile_rows, kSpareBlocks);
  } else {
    tile.sequence = find_sequence(problem, work.kv_head / problem.kv_heads);
    tile.kv_head = work.kv_head % problem.kv_heads;
  }
  const int number =
      tile_at(place, set_aside(problem, tile.sequence, tile_rows), tile.sequence.blocks(tile_rows));
  tile.first_query = number * tile_rows - tile.sequence.lead(tile_rows);
  tile.head = tile.kv_head * schedule.group + work.member;
  return tile;
}

// The schedule of a call with `tiles` query tiles set aside; `key_bytes` of each key and kv head are read.
inline Schedule make_schedule(const Problem& problem, int tiles, int64_t key_bytes) {
  const int sequences = problem.packs_queries() ? 1 : problem.batch;
  const int keys = problem.packs_keys() ? problem.seqlen_k / problem.batch : problem.seqlen_k;
  return make_schedule(tiles, sequences * problem.kv_heads, problem.heads / problem.kv_heads,
                       keys * key_bytes);
}

// Index of the first dimension of q and out, and of k and v where they are not in pages.
__device__ __forceinline__ int query_batch(const Problem& problem, const Sequence& sequence) {
  return problem.packs_queries() ? 0 : sequence.index;
}
__device__ __forceinline__ int key_batch(const Problem& problem, const Sequence& sequence) {
  return problem.packs_keys() ? 0 : sequence.index;
}

// Row of the first key of a block in k and v where they are not in pages.
__device__ __forceinline__ int key_row(const Sequence& sequence, int key_block) {
  return sequence.first_k + key_block * kKeyBlock;
}

// Where a key lies in pages.
struct PagedRow {
  int page;  // any number, where the table is wrong
  int row;
};

// The pages of a sequence's keys.
struct PageTable {
  const int32_t* entries;
  Divisor page_size;

  // Of a key that there is: other entries mean nothing.
  __device__ __forceinline__ PagedRow find(int key) const {
    const int number = page_size.quotient(key);
    return {entries[number], key - number * page_size.value};
  }
};

__device__ __forceinline__ PageTable page_table(const Problem& problem, const Sequence& sequence) {
  return {problem.block_table + sequence.index * problem.block_table_stride, problem.page_size};
}

// Row of a query in q and out.
__device__ __forceinline__ int query_row(const Sequence& sequence, int query) {
  return sequence.first_q + query;
}

// Row `row` of a head in q or out, or in k or v where they are not in pages; the tensor begins at `data`.
// The batch stride of packed tensors is 0.
template <class Element>
__device__ __forceinline__ Element* find_row(Element* data, const Strides& strides, const Sequence& sequence,
                                             int row, int head) {
  return data + sequence.index * strides.batch + row * strides.seqlen + head * strides.heads;
}

// Key `key` of a kv head in k or v, or null where its page does not exist, whose keys count as zeros.
template <class Element>
__device__ __forceinline__ Element* find_key(const Problem& problem, Element* data, const Strides& strides,
                                             const Sequence& sequence, int key, int kv_head) {
  if (!problem.has_pages()) {
    return find_row(data, strides, sequence, sequence.first_k + key, kv_head);
  }
  const PagedRow place = page_table(problem, sequence).find(key);
  const bool exists = static_cast<unsigned>(place.page) < static_cast<unsigned>(problem.pages);
  return exists ? data + place.page * strides.batch + place.row * strides.seqlen + kv_head * strides.heads
                : nullptr;
}

// The line of `lse`, of seqlen_q elements, that holds a tile's sequence and head; a query's element of it is
// its row in q.
__device__ __forceinline__ int64_t lse_line(const ForwardParams& params, const QueryTile& tile) {
  return params.packs_queries() ? tile.head : int64_t{tile.sequence.index} * params.heads + tile.head;
}

// The place of query block `index` of a sequence and head, in `kept` and in block masks.
__device__ __forceinline__ int64_t place_of_block(const Problem& problem, const Sequence& sequence, int head,
                                                  int index) {
  const int64_t columns = problem.query_blocks(problem.q_block);
  if (problem.packs_queries()) {
    return head * columns + packed_tile(problem.cu_seqlens_q, sequence.index, problem.q_block, kSpareBlocks) +
           index;
  }
  return (int64_t{sequence.index} * problem.heads + head) * columns + index;
}

// Number of key blocks that query block `index` of a tile's sequence kept.
__device__ __forceinline__ int32_t* kept_of_block(const ForwardParams& params, const QueryTile& tile,
                                                  int index) {
  return params.kept + place_of_block(params, tile.sequence, tile.head, index);
}

// The words of a block mask that belong to query block `index` of a sequence. Word: uint64_t, const or not.
template <class Word>
__device__ __forceinline__ Word* words_of_block(const Problem& problem, Word* block_mask, int mask_words,
                                                const Sequence& sequence, int head, int index) {
  return block_mask + place_of_block(problem, sequence, head, index) * mask_words;
}

// Where Problem::has_spare_blocks(), a sequence can have more columns of `kept` than blocks of queries: the
// tile with the last number, which may hold no query, sets the others to 0, with `threads` threads of which
// this is number `thread`.
__device__ __forceinline__ void clear_spare_kept(const ForwardParams& params, const QueryTile& tile,
                                                 int tile_rows, int thread, int threads) {
  const Sequence& sequence = tile.sequence;
  if (sequence.block_at(tile.first_query, tile_rows) != set_aside(params, sequence, tile_rows) - 1) {
    return;
  }
  const int columns = set_aside(params, sequence, params.q_block);
  for (int index = sequence.blocks(params.q_block) + thread; index < columns; index += threads) {
    *kept_of_block(params, tile, index) = 0;
  }
}

}  // namespace bsfa
