// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// What the kernels of sm_90a have in common: how a CTA begins, and the roles of its warps.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/copy_sm90_desc.hpp>

#include <algorithm>

#include "../common/launch.cuh"
#include "consumer.cuh"
#include "tensor_map.hpp"

namespace bsfa::sm90 {

__device__ __forceinline__ void prefetch(const TensorMaps& maps) {
  cute::prefetch_tma_descriptor(&maps.q);
  cute::prefetch_tma_descriptor(&maps.k);
  cute::prefetch_tma_descriptor(&maps.v);
}

// Calls initialize(storage) in one thread, before anything else happens in the CTA, then produce(storage,
// warp) in the warps of the first warpgroup and consume(storage, thread) in those of the others.
template <class Config, class Initialize, class Produce, class Consume>
__device__ __forceinline__ void run_roles(const Initialize& initialize, const Produce& produce,
                                          const Consume& consume) {
  static_assert(kRegistersFit<Config>);
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& storage = *reinterpret_cast<typename Config::SharedStorage*>(shared_memory);
  if (threadIdx.x == 0) {
    initialize(storage);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  ptx::wait_for_earlier_grids();

  // The same in all lanes, and known to be: the roles must be uniform for setmaxnreg.
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<Config::kProducerRegisters>();
    produce(storage, warp);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Config::kConsumerRegisters>();
    consume(storage, ConsumerThread{warp / 4 - 1, static_cast<int>(threadIdx.x % 128)});
  }
}

// Launches a kernel whose CTAs stay for all of `tiles`.
template <class Config, class Params>
void launch_persistent(void (*kernel)(Params), int tiles, const Params& params, cudaStream_t stream) {
  launch<90>(kernel, dim3(std::min(tiles, count_multiprocessors())), Config::kThreads,
             sizeof(typename Config::SharedStorage), stream, params);
}

}  // namespace bsfa::sm90
