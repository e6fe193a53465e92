// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// Where sequences, tiles of queries, key blocks and results lie, in padded and in packed tensors. Nothing
// else knows of cu_seqlens.
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
};

// A tile of queries of one head.
struct QueryTile {
  Sequence sequence;
  int head;
  int kv_head;
  int first_query;  // in its sequence

  __device__ __forceinline__ bool exists() const { return first_query < sequence.seqlen_q; }
};

// Where the tiles (or the blocks of queries) of sequence `index` begin among those of all packed sequences,
// when each holds `rows` queries. `spare` more than its length over `rows` are set aside for a sequence, one
// for its ragged end.
__device__ __forceinline__ int packed_tile(const int32_t* cu_seqlens, int index, int rows, int spare = 1) {
  return cu_seqlens[index] / rows + spare * index;
}

// The index of the packed sequence that a tile belongs to.
__device__ __forceinline__ int find_packed(const int32_t* cu_seqlens, int batch, int tile, int tile_rows,
                                           int spare = 1) {
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

__device__ __forceinline__ Sequence packed_sequence(const Problem& problem, int index) {
  const int first_q = problem.cu_seqlens_q[index];
  const int first_k = problem.cu_seqlens_k[index];
  return {index, first_q, first_k, problem.cu_seqlens_q[index + 1] - first_q,
          problem.cu_seqlens_k[index + 1] - first_k};
}

// The packed sequence that a tile of queries belongs to.
__device__ __forceinline__ Sequence find_sequence(const Problem& problem, int tile, int tile_rows,
                                                  int spare = 1) {
  return packed_sequence(problem, find_packed(problem.cu_seqlens_q, problem.batch, tile, tile_rows, spare));
}

// The tile of padded tensors that a piece of work of the schedule is on.
__device__ __forceinline__ QueryTile find_padded_tile(const Problem& problem, const Schedule& schedule,
                                                      const Work& work, int tile_rows) {
  QueryTile tile;
  tile.sequence = {work.kv_head / problem.kv_heads, 0, 0, problem.seqlen_q, problem.seqlen_k};
  tile.kv_head = work.kv_head % problem.kv_heads;
  tile.first_query = work.tile * tile_rows;
  tile.head = tile.kv_head * schedule.group + work.member;
  return tile;
}

// The tile at `index` of the schedule. No memory is read unless sequences are packed.
__device__ __forceinline__ QueryTile find_tile(const Problem& problem, const Schedule& schedule, int index,
                                               int tile_rows) {
  const Work work = find_work(schedule, index);
  if (!problem.is_packed()) {
    return find_padded_tile(problem, schedule, work, tile_rows);
  }
  QueryTile tile;
  tile.sequence = find_sequence(problem, work.tile, tile_rows);
  tile.kv_head = work.kv_head;
  tile.first_query =
      (work.tile - packed_tile(problem.cu_seqlens_q, tile.sequence.index, tile_rows)) * tile_rows;
  tile.head = tile.kv_head * schedule.group + work.member;
  return tile;
}

// The schedule of a call; `key_bytes` of each key and kv head are read.
inline Schedule make_schedule(const Problem& problem, int tile_rows, int64_t key_bytes) {
  const int group = problem.heads / problem.kv_heads;
  if (problem.is_packed()) {
    const int tiles = problem.seqlen_q / tile_rows + problem.batch;
    return make_schedule(tiles, problem.kv_heads, group, problem.seqlen_k / problem.batch * key_bytes);
  }
  const int tiles = (problem.seqlen_q + tile_rows - 1) / tile_rows;
  return make_schedule(tiles, problem.batch * problem.kv_heads, group, problem.seqlen_k * key_bytes);
}

// Index of the first dimension of q, k, v and out.
__device__ __forceinline__ int batch_coordinate(const Problem& problem, const Sequence& sequence) {
  return problem.is_packed() ? 0 : sequence.index;
}

// Row of the first key of a block in k and v.
__device__ __forceinline__ int key_row(const Sequence& sequence, int key_block) {
  return sequence.first_k + key_block * kKeyBlock;
}

// Row of a query in q and out.
__device__ __forceinline__ int query_row(const Sequence& sequence, int query) {
  return sequence.first_q + query;
}

// Row `row` of a head in q, k, v or out, which begin at `data`.
template <class Element>
__device__ __forceinline__ Element* find_row(const Problem& problem, Element* data, const Strides& strides,
                                             const Sequence& sequence, int row, int head) {
  return data + batch_coordinate(problem, sequence) * strides.batch + row * strides.seqlen +
         head * strides.heads;
}

// The line of `lse`, of seqlen_q elements, that holds a tile's sequence and head; a query's element of it is
// its row in q.
__device__ __forceinline__ int64_t lse_line(const ForwardParams& params, const QueryTile& tile) {
  return params.is_packed() ? tile.head : int64_t{tile.sequence.index} * params.heads + tile.head;
}

// Number of key blocks that query block `index` of a tile's sequence kept.
__device__ __forceinline__ int32_t* kept_of_block(const ForwardParams& params, const QueryTile& tile,
                                                  int index) {
  if (params.is_packed()) {
    const int columns = params.seqlen_q / params.q_block + params.batch;
    return params.kept + int64_t{tile.head} * columns +
           packed_tile(params.cu_seqlens_q, tile.sequence.index, params.q_block) + index;
  }
  const int blocks = (params.seqlen_q + params.q_block - 1) / params.q_block;
  return params.kept + (int64_t{tile.sequence.index} * params.heads + tile.head) * blocks + index;
}

// The words of a block mask that belong to query block `index` of a sequence: as in `kept`, whose code is not
// shared because other code there makes ptxas lay out the whole forward kernel anew. Word: uint64_t, const or
// not.
template <class Word>
__device__ __forceinline__ Word* words_of_block(const Problem& problem, Word* block_mask, int mask_words,
                                                const Sequence& sequence, int head, int index) {
  int64_t block;
  if (problem.is_packed()) {
    const int columns = problem.seqlen_q / problem.q_block + problem.batch;
    block =
        int64_t{head} * columns + packed_tile(problem.cu_seqlens_q, sequence.index, problem.q_block) + index;
  } else {
    const int blocks = (problem.seqlen_q + problem.q_block - 1) / problem.q_block;
    block = (int64_t{sequence.index} * problem.heads + head) * blocks + index;
  }
  return block_mask + block * mask_words;
}

// In packed tensors a sequence can have more columns of `kept` than blocks of queries: the tile at its last
// place, which may hold no query, sets the others to 0, with `threads` threads of which this is number
// `thread`.
__device__ __forceinline__ void clear_spare_kept(const ForwardParams& params, const QueryTile& tile,
                                                 int tile_rows, int thread, int threads) {
  const int32_t* starts = params.cu_seqlens_q;
  const int next = tile.sequence.index + 1;
  const int last_tile = starts[next] / tile_rows - starts[next - 1] / tile_rows;
  if (tile.first_query != last_tile * tile_rows) {
    return;
  }
  const int columns = starts[next] / params.q_block - starts[next - 1] / params.q_block + 1;
  const int blocks = (tile.sequence.seqlen_q + params.q_block - 1) / params.q_block;
  for (int index = blocks + thread; index < columns; index += threads) {
    *kept_of_block(params, tile, index) = 0;
  }
}

}  // namespace bsfa
