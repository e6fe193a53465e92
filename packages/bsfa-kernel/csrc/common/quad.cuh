// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// Reductions over the four threads of a quad, which share a row of the accumulators of mma.sync and wgmma.
#pragma once

#include "ptx.cuh"

namespace bsfa {

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ __forceinline__ float larger(float x, float y) {
  return ptx::max_nan(x, y);
}
__device__ __forceinline__ int larger(int x, int y) {
  return max(x, y);
}

// The largest of one of two rows over two neighbouring threads, or NaN: thread i of the quad has row i % 2.
// The other half of the row is with thread i ^ 2.
__device__ __forceinline__ float pair_row_max(const float (&rows)[2]) {
  const bool odd = threadIdx.x % 2 == 1;
  return ptx::max_nan(odd ? rows[1] : rows[0],  //
                      __shfl_xor_sync(0xffffffff, odd ? rows[0] : rows[1], 1));
}

// The largest of one of four rows over the quad, or NaN: thread i has row i. In fewer shuffles than all rows
// in all threads would take.
template <class Value>
__device__ __forceinline__ Value quad_row_max(const Value (&rows)[4]) {
  const bool odd = threadIdx.x % 2 == 1;
  const bool upper = threadIdx.x % 4 >= 2;
  Value pair[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Value mine = odd ? rows[2 * i + 1] : rows[2 * i];
    const Value other = odd ? rows[2 * i] : rows[2 * i + 1];
    pair[i] = larger(mine, __shfl_xor_sync(0xffffffff, other, 1));
  }
  return larger(upper ? pair[1] : pair[0],  //
                __shfl_xor_sync(0xffffffff, upper ? pair[0] : pair[1], 2));
}

// The same of one of two rows: thread i has row i % 2.
__device__ __forceinline__ float quad_row_max(const float (&rows)[2]) {
  const float pair = pair_row_max(rows);
  return larger(pair, __shfl_xor_sync(0xffffffff, pair, 2));
}

__device__ __forceinline__ bool quad_any(bool x) {
  return __ballot_sync(0xffffffff, x) >> threadIdx.x % 32 / 4 * 4 & 0xf;
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

}  // namespace bsfa
