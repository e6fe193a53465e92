// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The thresholds and the rules that compare with them (docs/semantics.md).
#pragma once

#include <math_constants.h>

#include "../params.hpp"

namespace bsfa {

// The row of the thresholds that the block of queries beginning at `first_query` reads: its absolute
// position.
__device__ __forceinline__ int threshold_row(int first_query, int seqlen_q, int seqlen_k, int q_block,
                                             int rows) {
  return min(max(first_query + seqlen_k - seqlen_q, 0) / q_block, rows - 1);
}

// What the scaled scores of a row must reach to keep an unforced block, given the largest score `maximum`
// (not scaled) and the sum of exponentials `sum` of what the row has kept so far. NaN where the sum is.
__device__ __forceinline__ float row_reference(Rule rule, float scale, float maximum, float sum) {
  if (rule == Rule::kAbsolute) {
    return 0.0f;
  }
  return scale * maximum + (rule == Rule::kPeakLse ? __logf(sum) : 0.0f * sum);
}

// The bound that follows from a reference; one that is NaN is passed by all scores.
__device__ __forceinline__ float raised_bound(float threshold, float reference) {
  return fmaxf(threshold + reference, -CUDART_INF_F);
}

// Whether a score votes to keep: one that is NaN does. A bound of NaN is reached by none.
__device__ __forceinline__ bool reaches(float scaled_score, float bound) {
  return fminf(scaled_score, CUDART_INF_F) >= bound;
}

}  // namespace bsfa
