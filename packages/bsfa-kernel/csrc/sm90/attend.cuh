// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The kernels of attend_blocks for sm_90a and their launch. docs/kernel-attend.md has the picture.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include <algorithm>

#include "../check.hpp"
#include "../common/launch.cuh"
#include "attend.hpp"
#include "attend_order.cuh"
#include "attend_pass.cuh"
#include "attend_producer.cuh"
#include "attend_shared.cuh"
#include "attend_union.cuh"

namespace bsfa::sm90 {

// Called by one thread, before anything else happens in the CTA.
template <class Config>
__device__ __forceinline__ void initialize_list_barriers(typename Config::SharedStorage& storage) {
  constexpr int kReaders = Config::kConsumerWarps;
  storage.q_full.init(1);
  storage.q_empty.init(kReaders);
  for (int slot = 0; slot < Config::kTileSlots; ++slot) {
    storage.tile_full[slot].init(1);
    storage.tile_empty[slot].init(kReaders + 2);  // and the loaders
  }
  for (auto* ring : {&storage.keys, &storage.values}) {
    for (int stage = 0; stage < Config::kStages; ++stage) {
      ring->full[stage].init(1);
      ring->empty[stage].init(kReaders);
    }
    for (auto& places : ring->places) {
      for (Place& place : places) {
        place = {0, 0};
      }
    }
  }
  cutlass::arch::fence_barrier_init();
}

template <class Config>
__device__ __forceinline__ void consume_lists(const AttendParams& params,
                                              typename Config::SharedStorage& storage,
                                              const ConsumerThread& who) {
  using namespace cute;
  ListPipelines<Config> pipelines;
#pragma unroll 1
  while (true) {
    wait(storage.q_full, pipelines.queries_phase());
    const int slot = pipelines.slot();
    const ListTile& tile = storage.tiles[slot];
    if (uniform(tile.is_end)) {
      return;
    }
    if (uniform(tile.lengths[who.warpgroup] > 0)) {
      attend_lists<Config>(storage, pipelines, params, who);
    } else {
      release(storage.q_empty, who);
      ++pipelines.tiles;
      auto output = partition_fragment_C(typename Config::ValuesMma{}, Shape<_64, Int<Config::kHeadDim>>{});
      clear(output);
      store_list<Config>(storage, params, who, slot, output, Softmax{});
    }
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    attend_kernel(const __grid_constant__ AttendKernelParams params) {
  static_assert(kRegistersFit<Config>);
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& storage = *reinterpret_cast<typename Config::SharedStorage*>(shared_memory);
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(&params.q);
    cute::prefetch_tma_descriptor(&params.k);
    cute::prefetch_tma_descriptor(&params.v);
    initialize_list_barriers<Config>(storage);
  }
  __syncthreads();
  ptx::wait_for_earlier_grids();

  // The same in all lanes, and known to be: the roles must be uniform for setmaxnreg.
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<Config::kProducerRegisters>();
    const ListProducer<Config> producer{params, storage};
    if (threadIdx.x == 0) {
      producer.take_tiles();
    } else if (warp == 1 || warp == 2) {
      const CUtensorMap& map = warp == 1 ? params.k : params.v;
      auto* const blocks = warp == 1 ? storage.k : storage.v;
      auto& ring = warp == 1 ? storage.keys : storage.values;
      if (params.order.attend.has_pages()) {
        producer.template load_blocks<true>(map, blocks, ring);
      } else {
        producer.template load_blocks<false>(map, blocks, ring);
      }
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Config::kConsumerRegisters>();
    consume_lists<Config>(params.order.attend, storage, {warp / 4 - 1, static_cast<int>(threadIdx.x % 128)});
  }
}

template <class Element, int kHeadDim>
void attend_blocks(const AttendParams& params, cudaStream_t stream) {
  using Config = ForwardConfig<Element, kHeadDim>;
  const int processors = count_multiprocessors();
  AttendKernelParams kernel_params;
  static_cast<TensorMaps&>(kernel_params) = make_tensor_maps<Element>(params, kKeyBlock, Config::kBoxColumns);
  OrderParams& order = kernel_params.order;
  order.attend = params;
  order.schedule = make_schedule(params, params.query_blocks(kAttendTileQ), 2 * kHeadDim * sizeof(Element));
  order.tiles = static_cast<int>(order.schedule.ctas());
  if (order.tiles != count_attend_tiles(params)) {
    fail(BSFA_INTERNAL_ERROR, "the workspace of attend_blocks was sized for ", count_attend_tiles(params),
         " tiles, and there are ", order.tiles);
  }
  auto* workspace = static_cast<char*>(params.workspace);
  order.taken = reinterpret_cast<int*>(workspace);
  order.ordered = reinterpret_cast<OrderedTile*>(workspace + kAttendHeaderBytes);
  order.lengths = reinterpret_cast<TileLength*>(order.ordered + order.tiles);

  constexpr int kCountWarps = 8;
  const int count_ctas = std::min((order.tiles + kCountWarps - 1) / kCountWarps, 8 * processors);
  launch<90>(count_blocks_kernel<Config>, dim3(count_ctas), kCountWarps * 32, 0, stream, order);
  const int sections = (order.schedule.kv_heads + order.schedule.section - 1) / order.schedule.section;
  launch<90>(order_tiles_kernel<Config>, dim3(sections), kOrderThreads, 0, stream, order);
  const auto launch_over_tiles = [&](auto kernel, auto config) {
    constexpr int kSharedBytes = sizeof(typename decltype(config)::SharedStorage);
    BSFA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    launch<90>(kernel, dim3(std::min(order.tiles, processors)), Config::kThreads, kSharedBytes, stream,
               kernel_params);
  };
  if (params.q_block == kAttendTileQ) {
    using SharedConfig = SharedListConfig<Element, kHeadDim>;
    launch_over_tiles(attend_shared_kernel<SharedConfig>, SharedConfig{});
  } else if constexpr (Config::kStepBlocks == 1) {
    using LocalConfig = UnionConfig<Element, kHeadDim>;
    launch_over_tiles(attend_union_kernel<LocalConfig>, LocalConfig{});
  } else {
    using LocalConfig = AttendConfig<Element, kHeadDim>;
    launch_over_tiles(attend_kernel<LocalConfig>, LocalConfig{});
  }
}

}  // namespace bsfa::sm90
