// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// Launching, since compute capability 9.0 with programmatic dependent launch.
#pragma once

#include <cuda_runtime.h>

#include "../check.hpp"
#include "ptx.cuh"

namespace bsfa {

// What comes first in such a kernel, before any access to global memory.
template <int kArch>
__device__ __forceinline__ void begin() {
  if constexpr (kArch >= 90) {
    ptx::wait_for_earlier_grids();
  }
}

// Of the current device.
inline int count_multiprocessors() {
  int device = 0;
  int count = 0;
  BSFA_CUDA_CHECK(cudaGetDevice(&device));
  BSFA_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Launches a kernel compiled for kArch with as much shared memory as it asks for. On 9.0 its start, up to
// begin<kArch>(), may overlap the end of the stream's work before it.
template <int kArch, class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  BSFA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(shared_bytes)));
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = kArch >= 90 ? 1 : 0;
  BSFA_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace bsfa
