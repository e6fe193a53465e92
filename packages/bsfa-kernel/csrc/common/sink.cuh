// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// Attention sinks: a score of a head that joins the softmax of its rows and has no value (docs/semantics.md).
#pragma once

#include <math_constants.h>

#include "../params.hpp"
#include "ptx.cuh"

namespace bsfa {

// Of a head, in units of scaled scores; -inf where there is none.
__device__ __forceinline__ float sink_of(const Problem& problem, int head) {
  // Not __ldg: under PDL the producer of `sinks` may still be running.
  return problem.sinks == nullptr ? -CUDART_INF_F : problem.sinks[head];
}

// What a row comes to.
struct RowResult {
  float factor;  // of its output
  float lse;
};

// `maximum`: what the row's output and `sum` are relative to, scaled. The sink joins last: were it in the
// maximum from the first, it could make probabilities smaller than 16 bits hold.
__device__ __forceinline__ RowResult finish_row(float maximum, float sum, float sink) {
  const float larger = fmaxf(maximum, sink);
  const float peak = larger == -CUDART_INF_F ? 0.0f : larger;
  const float share = ptx::exp2_approx((maximum - peak) * CUDART_L2E_F);
  const float total = fmaf(sum, share, ptx::exp2_approx((sink - peak) * CUDART_L2E_F));
  if (total == 0.0f) {
    return {0.0f, -CUDART_INF_F};
  }
  // Not by a call, as 1 / total would: ptxas serialises wgmma under way across calls.
  return {share * __fdividef(1.0f, total), peak + logf(total)};
}

}  // namespace bsfa
