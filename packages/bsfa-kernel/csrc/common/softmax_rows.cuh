// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// What the online softmax keeps of the rows that a thread has a part in.
#pragma once

#include <math_constants.h>

#include "ptx.cuh"

namespace bsfa {

template <int kRows>
struct SoftmaxRows {
  float maximum[kRows];  // what scores are seen relative to, not scaled; the same in the threads of a quad
  float sum[kRows];      // of exp(scale * (score - maximum)) over the thread's columns

  __device__ __forceinline__ SoftmaxRows() {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      maximum[row] = -CUDART_INF_F;
      sum[row] = 0.0f;
    }
  }

  // Gives a row a maximum that is not below the one it has. Returns whether it is above; `factor` is what the
  // row of the output must be multiplied by.
  __device__ __forceinline__ bool raise_row(int row, float highest, float scale_log2, float& factor) {
    const float previous = maximum[row];
    maximum[row] = highest;
    factor = ptx::exp2_approx((previous - finite_maximum(row)) * scale_log2);
    sum[row] *= factor;
    return maximum[row] > previous;
  }

  // A row that has seen nothing has maximum -inf, and -inf - -inf would be NaN.
  __device__ __forceinline__ float finite_maximum(int row) const {
    return maximum[row] == -CUDART_INF_F ? 0.0f : maximum[row];
  }
};

}  // namespace bsfa
