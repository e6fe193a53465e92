// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The key blocks that the query blocks of a tile attend, read from a block mask (docs/semantics.md).
#pragma once

#include <math_constants.h>

#include "query_block.cuh"

namespace bsfa {

// Whether the outputs of the block of queries that begins at `first_query` are NaN: where the threshold of
// the selection is, and where the call or the mask has no room for all keys of the sequence.
__device__ __forceinline__ bool is_poisoned(const AttendParams& params, const QueryTile& tile,
                                            int first_query) {
  const Sequence& sequence = tile.sequence;
  if (!sequence.has_query_in(first_query, params.q_block)) {
    return false;
  }
  if (sequence.oversized || sequence.seqlen_k > int64_t{params.mask_words} * kMaskBits * kKeyBlock) {
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
  block.index = sequence.block_at(first_query, params.q_block);
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

// A walk from the last to the first over the key blocks that one of a tile's two query blocks attends. Where
// the tile is one query block, both are the same.
class BlockList {
 public:
  __device__ __forceinline__ BlockList(const AttendParams& params, const QueryTile& tile,
                                       const QueryBlock& first, const QueryBlock& second)
      : words_{find_words(params, tile, first.index), find_words(params, tile, second.index)},
        visible_{first.keys.visible, second.keys.visible},
        word_((max(first.keys.visible, second.keys.visible) + kMaskBits - 1) / kMaskBits),
        bits_{0, 0} {}

  // Number of the next key block times four, plus a bit for each query block that attends it; -1 at the end.
  __device__ __forceinline__ int next() {
    while ((bits_[0] | bits_[1]) == 0) {
      if (word_ == 0) {
        return -1;
      }
      --word_;
      for (int i = 0; i < 2; ++i) {
        bits_[i] = visible_word(words_[i], word_, visible_[i]);
      }
    }
    const int bit = kMaskBits - 1 - __clzll(static_cast<int64_t>(bits_[0] | bits_[1]));
    const int attended = static_cast<int>(bits_[0] >> bit) + 2 * static_cast<int>(bits_[1] >> bit);
    const uint64_t below = (uint64_t{1} << bit) - 1;
    bits_[0] &= below;
    bits_[1] &= below;
    return (word_ * kMaskBits + bit) * 4 + attended;
  }

 private:
  const uint64_t* words_[2];
  int visible_[2];
  int word_;  // that bits_ are of
  uint64_t bits_[2];
};

}  // namespace bsfa
