// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The key blocks that a block of queries attends to, as a block mask has them (docs/semantics.md).
#pragma once

#include <math_constants.h>

#include "query_block.cuh"

namespace bsfa {

// Whether the outputs of the block of queries that begins at `first_query` are NaN: where the threshold of
// the selection is, and where the mask has too few words for the sequence.
__device__ __forceinline__ bool is_poisoned(const AttendParams& params, const QueryTile& tile,
                                            int first_query) {
  const Sequence& sequence = tile.sequence;
  if (first_query >= sequence.seqlen_q) {
    return false;
  }
  if (sequence.seqlen_k > int64_t{params.mask_words} * kMaskBits * kKeyBlock) {
    return true;
  }
  if (params.thresholds == nullptr) {
    return false;
  }
  const int row =
      threshold_row(first_query, sequence.seqlen_q, sequence.seqlen_k, params.q_block, params.threshold_rows);
  // Not __ldg: under PDL the producer of `thresholds` may still be running.
  return isnan(params.thresholds[int64_t{tile.head} * params.threshold_rows + row]);
}

// That block as find_query_block() finds it, with nothing to vote on.
__device__ __forceinline__ QueryBlock find_attended_block(const AttendParams& params,
                                                          const Sequence& sequence, int first_query,
                                                          bool poisoned) {
  const Visibility sees{sequence.seqlen_q, sequence.seqlen_k, params.causal};
  QueryBlock block;
  block.index = first_query / params.q_block;
  block.threshold = poisoned ? CUDART_NAN_F : -CUDART_INF_F;
  block.keys = poisoned ? KeyBlocks{0, 0} : key_blocks(sees, first_query, params.q_block);
  block.undecided = 0;
  return block;
}

// The words of query block `index` of the tile's sequence in the mask.
const __device__ __forceinline__ uint64_t* find_words(const AttendParams& params, const QueryTile& tile,
                                                      int index) {
  return words_of_block(params, params.block_mask, params.mask_words, tile.sequence, tile.head, index);
}

// Word `word` of them, without the blocks from `visible` on; not read where there are no others.
__device__ __forceinline__ uint64_t visible_word(const uint64_t* words, int word, int visible) {
  const int seen = min(visible - word * kMaskBits, kMaskBits);
  return seen <= 0 ? 0 : words[word] & ~uint64_t{0} >> (kMaskBits - seen);
}

}  // namespace bsfa
