// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// What every kernel receives: the checked arguments of the C interface, in the kernels' own types.
#pragma once

#include <cstdint>

namespace bsfa {

// Keys in a sparsity block, in every geometry; the number of queries is a run-time argument (128 or 64).
inline constexpr int kKeyBlock = 64;

// Head dimensions are multiples of kHeadDimStep, which are 16 bytes, up to kMaxHeadDim.
inline constexpr int kHeadDimStep = 8;
inline constexpr int kMaxHeadDim = 256;

// Bits in a word of a block mask.
inline constexpr int kMaskBits = 64;

enum class Rule : int32_t { kAbsolute = 0, kRunningMax = 1, kPeakLse = 2 };

enum class Precision : int32_t { kExact = 0, kInt8 = 1 };

// Strides in elements; that of head_dim is 1.
struct Strides {
  int64_t batch;  // 0 where packed (varlen); of k and v in pages: from page to page
  int64_t seqlen;
  int64_t heads;
};

// Divides by a number that the compiler does not know, without a division.
struct Divisor {
  int32_t value;
  uint32_t multiplier;
  int32_t shift;

  // Exact below 2^31, for 1 < value < 2^31.
  static constexpr Divisor of(int32_t value) {
    int32_t bits = 1;
    while ((int64_t{1} << bits) < value) {
      ++bits;
    }
    const uint64_t power = uint64_t{1} << (31 + bits);
    return {value, static_cast<uint32_t>((power + value - 1) / value), bits - 1};
  }
  constexpr int32_t quotient(int32_t x) const {
    return static_cast<int32_t>((uint64_t{multiplier} * static_cast<uint32_t>(x) >> 32) >> shift);
  }
};

// What every kernel is told.
struct Problem {
  const void* q;  // [batch, seqlen_q, heads, head_dim], packed: [total_q, heads, head_dim]
  const void* k;  // [batch, seqlen_k, kv_heads, head_dim], packed: [total_k, kv_heads, head_dim]; or pages
  Strides q_strides, k_strides;

  int32_t batch;
  int32_t heads;
  int32_t kv_heads;
  int32_t head_dim;  // at most that of the kernel, which takes further columns for zeros
  int32_t seqlen_q;  // packed: total_q
  int32_t seqlen_k;  // packed: total_k; with seqused_k the most keys that a sequence may have

  float scale;
  Rule rule;
  int32_t voters;   // one row in so many votes: 1, 2 or 4
  bool causal;      // aligned to the bottom right
  int32_t q_block;  // queries in a sparsity block: 128 or 64

  const int32_t* cu_seqlens_q;  // [batch + 1], or null where queries are not packed
  const int32_t* cu_seqlens_k;  // [batch + 1], or null where keys are not packed; then queries are, too
  const int32_t* seqused_k;     // [batch]: keys of each sequence; or null. Not where keys are packed

  // Keys and values in pages: [pages, page_size, kv_heads, head_dim]. Only with seqused_k.
  const int32_t* block_table;  // [batch, ...]: the pages of each sequence; or null
  int64_t block_table_stride;
  int32_t pages;
  Divisor page_size;  // a multiple of 16

  const float* sinks;  // [heads], units of scaled scores; or null

  constexpr bool packs_queries() const { return cu_seqlens_q != nullptr; }
  constexpr bool packs_keys() const { return cu_seqlens_k != nullptr; }
  constexpr bool has_pages() const { return block_table != nullptr; }
  // Whether rows of k and v behind a sequence's last key may hold anything, NaN too. Elsewhere the tensors
  // end there.
  constexpr bool has_foreign_keys() const { return packs_keys() || seqused_k != nullptr; }
  // Whether more query blocks are set aside than a sequence may have, since only the device knows.
  constexpr bool has_spare_blocks() const { return packs_queries() || seqused_k != nullptr; }
  // How many blocks of `rows` queries, a power of two up to 128, are set aside: for each sequence, or
  // (packed) for all. They begin at absolute multiples of `rows`, so that a sequence can have a cut one at
  // either end.
  constexpr int32_t query_blocks(int32_t rows) const {
    if (packs_queries()) {
      return seqlen_q / rows + 2 * batch;
    }
    if (seqused_k != nullptr) {
      return (seqlen_q + 2 * (rows - 1)) / rows;
    }
    const int32_t lead = (seqlen_k - seqlen_q) & (rows - 1);
    return seqlen_q == 0 ? 0 : (seqlen_q + lead + rows - 1) / rows;
  }
};

struct ForwardParams : Problem {
  const void* v;  // as k
  void* out;      // as q
  Strides v_strides, out_strides;

  const float* thresholds;  // [heads, threshold_rows], units of scaled scores
  int32_t threshold_rows;

  float* lse;     // [batch, heads, seqlen_q], packed: [heads, total_q]; or null
  int32_t* kept;  // [batch, heads, query_blocks(q_block)], packed: [heads, ...]; or null
};

struct SelectParams : Problem {
  // Whether scores in 8 bits must be whole: otherwise all that they are compared with lacks the same.
  constexpr bool needs_offset_scores() const { return rule == Rule::kAbsolute || sinks != nullptr; }

  const float* thresholds;  // [heads, threshold_rows], units of scaled scores
  int32_t threshold_rows;

  Precision precision;
  uint64_t* block_mask;  // [batch, heads, query_blocks(q_block), mask_words], packed: [heads, ...]
  int32_t mask_words;    // for a sequence of up to mask_words * kMaskBits key blocks
  void* workspace;
};

struct AttendParams : ForwardParams {  // thresholds may be null: they say only where the outputs are NaN
  const uint64_t* block_mask;          // as above
  int32_t mask_words;
  void* workspace;
};

struct BlockMaximaParams : Problem {  // not packed
  float* maxima;  // [batch, heads, query_blocks(q_block), k_blocks], every element is written
};

}  // namespace bsfa
