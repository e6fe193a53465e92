// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// Reductions over the four threads of a quad, which share a row of the accumulators of mma.sync and wgmma.
#pragma once

namespace bsfa {

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ __forceinline__ bool quad_any(bool x) {
  return __ballot_sync(0xffffffff, x) >> threadIdx.x % 32 / 4 * 4 & 0xf;
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

}  // namespace bsfa
