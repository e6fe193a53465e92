// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// What every kernel receives: the checked arguments of the C interface, in the kernels' own types.
#pragma once

#include <cstdint>

namespace bsfa {

// Keys in a sparsity block, in every geometry; the number of queries is a run-time argument (128 or 64).
inline constexpr int kKeyBlock = 64;

// Bits in a word of a block mask.
inline constexpr int kMaskBits = 64;

enum class Rule : int32_t { kAbsolute = 0, kRunningMax = 1, kPeakLse = 2 };

enum class Precision : int32_t { kExact = 0, kInt8 = 1 };

// Strides in elements; that of head_dim is 1.
struct Strides {
  int64_t batch;  // 0 where packed (varlen)
  int64_t seqlen;
  int64_t heads;
};

// What every kernel is told.
struct Problem {
  const void* q;  // [batch, seqlen_q, heads, head_dim], varlen: [total_q, heads, head_dim]
  const void* k;  // [batch, seqlen_k, kv_heads, head_dim], varlen: [total_k, kv_heads, head_dim]
  Strides q_strides, k_strides;

  int32_t batch;
  int32_t heads;
  int32_t kv_heads;
  int32_t seqlen_q;  // varlen: total_q
  int32_t seqlen_k;  // varlen: total_k

  float scale;
  Rule rule;
  int32_t voters;   // one row in so many votes: 1, 2 or 4
  bool causal;      // aligned to the bottom right
  int32_t q_block;  // queries in a sparsity block: 128 or 64

  const int32_t* cu_seqlens_q;  // [batch + 1], or null where not varlen
  const int32_t* cu_seqlens_k;  // [batch + 1], or null where not varlen

  constexpr bool is_packed() const { return cu_seqlens_q != nullptr; }
};

struct ForwardParams : Problem {
  const void* v;  // as k
  void* out;      // as q
  Strides v_strides, out_strides;

  const float* thresholds;  // [heads, threshold_rows], units of scaled scores
  int32_t threshold_rows;

  float* lse;     // [batch, heads, seqlen_q], varlen: [heads, total_q]; or null
  int32_t* kept;  // [batch, heads, q_blocks], varlen: [heads, total_q / q_block + batch]; or null
};

struct SelectParams : Problem {
  const float* thresholds;  // [heads, threshold_rows], units of scaled scores
  int32_t threshold_rows;

  Precision precision;
  uint64_t*
      block_mask;  // [batch, heads, q_blocks, mask_words], varlen: [heads, total_q / q_block + batch, ...]
  int32_t mask_words;  // for a sequence of up to mask_words * kMaskBits key blocks
  void* workspace;
};

struct AttendParams : ForwardParams {  // thresholds may be null: they say only where the outputs are NaN
  const uint64_t* block_mask;          // as above
  int32_t mask_words;
  void* workspace;
};

struct BlockMaximaParams : Problem {  // not packed
  float* maxima;                      // [batch, heads, q_blocks, k_blocks], every element is written
};

}  // namespace bsfa
