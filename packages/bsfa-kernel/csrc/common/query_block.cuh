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
  int index;  // in its sequence
  float threshold;
  KeyBlocks keys;
  int undecided;  // the key blocks [0, undecided) are voted on, [undecided, keys.visible) are kept
};

__device__ __forceinline__ bool is_poisoned(const QueryBlock& block) {
  return isnan(block.threshold);
}

// The block that begins at `first_query` of a sequence. One beyond its end visits nothing.
__device__ __forceinline__ QueryBlock find_query_block(const ForwardParams& params, const Sequence& sequence,
                                                       int head, int first_query) {
  const Visibility sees{sequence.seqlen_q, sequence.seqlen_k, params.causal};
  QueryBlock block;
  block.index = first_query / params.q_block;
  const int row =
      threshold_row(first_query, sees.seqlen_q, sees.seqlen_k, params.q_block, params.threshold_rows);
  // Not __ldg: under PDL the producer of `thresholds` may still be running.
  const bool exists = first_query < sees.seqlen_q;
  block.threshold = exists ? params.thresholds[int64_t{head} * params.threshold_rows + row] : -CUDART_INF_F;
  block.keys = is_poisoned(block) ? KeyBlocks{0, 0} : key_blocks(sees, first_query, params.q_block);
  block.undecided = block.threshold == -CUDART_INF_F ? 0 : block.keys.full;
  return block;
}

// Whether a query of the block, of index `query` in its sequence, votes.
__device__ __forceinline__ bool is_voter(const ForwardParams& params, const QueryBlock& block, int seqlen_q,
                                         int query) {
  const int others = params.voters - 1;  // a mask; that of the row in its block would give the same
  const bool chosen = (query & others) == others;
  const bool in_last = (block.index + 1) * params.q_block >= seqlen_q;
  return block.threshold < CUDART_INF_F && query < seqlen_q && (chosen || in_last);
}

}  // namespace bsfa
