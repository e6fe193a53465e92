// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// A block of queries: its threshold, and the key blocks that it visits.
#pragma once

#include <math_constants.h>

#include "layout.cuh"
#include "mask.cuh"
#include "threshold.cuh"

namespace bsfa {

struct QueryBlock {
  int index;  // in its sequence; of one that does not exist below 0 or too large
  float threshold;
  KeyBlocks keys;
  int undecided;  // the key blocks [0, undecided) are voted on, [undecided, keys.visible) are kept
};

__device__ __forceinline__ bool is_poisoned(const QueryBlock& block) {
  return isnan(block.threshold);
}

// The block that begins at `first_query` of a sequence. One without a query visits nothing.
__device__ __forceinline__ QueryBlock find_query_block(const ForwardParams& params, const Sequence& sequence,
                                                       int head, int first_query) {
  const Visibility sees{sequence.seqlen_q, sequence.seqlen_k, params.causal};
  QueryBlock block;
  block.index = sequence.block_at(first_query, params.q_block);
  const int row =
      threshold_row(first_query, sees.seqlen_q, sees.seqlen_k, params.q_block, params.threshold_rows);
  block.threshold = -CUDART_INF_F;
  if (sequence.has_query_in(first_query, params.q_block)) {
    // Not __ldg: under PDL the producer of `thresholds` may still be running.
    const float threshold = params.thresholds[int64_t{head} * params.threshold_rows + row];
    block.threshold = sequence.oversized ? CUDART_NAN_F : threshold;
  }
  block.keys = is_poisoned(block) ? KeyBlocks{0, 0} : key_blocks(sees, first_query, params.q_block);
  block.undecided = block.threshold == -CUDART_INF_F ? 0 : block.keys.full;
  return block;
}

// Whether a query of the block, of index `query` in its sequence, votes.
__device__ __forceinline__ bool is_voter(const ForwardParams& params, const QueryBlock& block,
                                         const Sequence& sequence, int query) {
  const int others = params.voters - 1;  // a mask; that of the row in its block would give the same
  const bool chosen = ((query + sequence.seqlen_k - sequence.seqlen_q) & others) == others;
  const bool in_last = block.index + 1 == sequence.blocks(params.q_block);
  return block.threshold < CUDART_INF_F && sequence.has_query(query) && (chosen || in_last);
}

}  // namespace bsfa
