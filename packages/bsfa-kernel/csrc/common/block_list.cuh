// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The key blocks that the query blocks of a tile attend, read from a block mask (docs/semantics.md).
#pragma once

#include <math_constants.h>

#include "query_block.cuh"

namespace bsfa {

// The block that begins at `first_query` of a sequence, as find_query_block() finds it: every key block of it
// is decided. Its threshold is NaN where the outputs must be: where that of the selection is, and where the
// mask has too few words for the sequence.
__device__ __forceinline__ QueryBlock find_attended_block(const AttendParams& params,
                                                          const Sequence& sequence, int head,
                                                          int first_query) {
  const Visibility sees{sequence.seqlen_q, sequence.seqlen_k, params.causal};
  QueryBlock block;
  block.index = first_query / params.q_block;
  block.threshold = 0.0f;
  if (params.thresholds != nullptr && first_query < sees.seqlen_q) {
    const int row =
        threshold_row(first_query, sees.seqlen_q, sees.seqlen_k, params.q_block, params.threshold_rows);
    block.threshold = params.thresholds[int64_t{head} * params.threshold_rows + row];
  }
  if (sees.seqlen_k > int64_t{params.mask_words} * kMaskBits * kKeyBlock) {
    block.threshold = CUDART_NAN_F;
  }
  block.keys = is_poisoned(block) ? KeyBlocks{0, 0} : key_blocks(sees, first_query, params.q_block);
  block.undecided = block.keys.visible;
  return block;
}

// A walk from the last to the first over the key blocks that one of a tile's two query blocks attends. Where
// the tile is one query block, both are the same.
class BlockList {
 public:
  __device__ __forceinline__ BlockList(const AttendParams& params, const QueryTile& tile,
                                       const QueryBlock& first, const QueryBlock& second)
      : rows_{words_of(params, tile, first), words_of(params, tile, second)},
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
        bits_[i] = visible_bits(rows_[i], word_, visible_[i]);
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
  const __device__ __forceinline__ static uint64_t* words_of(const AttendParams& params,
                                                             const QueryTile& tile, const QueryBlock& block) {
    return words_of_block(params, params.block_mask, params.mask_words, tile.sequence, tile.head,
                          block.index);
  }

  // The bits of a word that stand for the key blocks [0, visible).
  __device__ __forceinline__ static uint64_t visible_bits(const uint64_t* row, int word, int visible) {
    const int seen = min(visible - word * kMaskBits, kMaskBits);
    return seen <= 0 ? 0 : row[word] & ~uint64_t{0} >> (kMaskBits - seen);
  }

  const uint64_t* rows_[2];
  int visible_[2];
  int word_;  // that bits_ are of
  uint64_t bits_[2];
};

}  // namespace bsfa
