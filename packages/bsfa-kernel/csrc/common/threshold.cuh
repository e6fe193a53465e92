// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The thresholds and the rules that compare with them (docs/semantics.md).
#pragma once

#include <math_constants.h>

#include "../params.hpp"
#include "ptx.cuh"
#include "sink.cuh"

namespace bsfa {

// The row of the thresholds that the block of queries beginning at `first_query`, which is below 0 where the
// block is cut, reads: its absolute position.
__device__ __forceinline__ int threshold_row(int first_query, int seqlen_q, int seqlen_k, int q_block,
                                             int rows) {
  return min(max(first_query + seqlen_k - seqlen_q, 0) / q_block, rows - 1);
}

// What the peaks of a row are compared with, which follows from its peaks in the blocks visited so far.
struct RowReference {
  float value;  // -inf where a relative rule has seen nothing, NaN once it has seen NaN or +inf

  // By a relative rule, as if a peak of the sink's height had been seen.
  __device__ __forceinline__ static RowReference first(const Problem& problem, int head) {
    const float sink = problem.rule == Rule::kAbsolute ? 0.0f : sink_of(problem, head);
    return {sink == CUDART_INF_F ? CUDART_NAN_F : sink};
  }

  // How far a peak is above the reference. The row votes to skip where this is below the threshold; NaN is
  // not, for instance that of a peak of -inf where nothing has been seen.
  __device__ __forceinline__ float excess(float peak) const { return peak - value; }

  // Takes a peak in, by a relative rule. One of -inf, as of a row that sees nothing of the block, changes
  // nothing.
  __device__ __forceinline__ void take(Rule rule, float peak) {
    const float larger = ptx::max_nan(value, peak);
    // By how much the logarithm of the sum exceeds the larger one. Of NaN, here the distance of two equal
    // infinities, fminf makes 0.
    const float distance = fminf(-fabsf(excess(peak)) * CUDART_L2E_F, 0.0f);
    // A factor instead of a branch, for which ptxas would put what follows behind the peak.
    const float unit = rule == Rule::kPeakLse ? CUDART_LN2_F : 0.0f;
    const float taken = fmaf(unit, ptx::log2_approx(1.0f + ptx::exp2_approx(distance)), larger);
    value = taken == CUDART_INF_F ? CUDART_NAN_F : taken;
  }
};

}  // namespace bsfa
