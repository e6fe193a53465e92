// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The kernels of attend_blocks for sm_90a and their launch. docs/kernel-attend.md has the picture.
#pragma once

#include <algorithm>

#include "../check.hpp"
#include "attend.hpp"
#include "attend_order.cuh"
#include "attend_pass.cuh"
#include "attend_producer.cuh"
#include "attend_shared.cuh"
#include "attend_union.cuh"
#include "roles.cuh"

namespace bsfa::sm90 {

// Called by one thread, before anything else happens in the CTA.
template <class Config>
__device__ __forceinline__ void initialize_list_barriers(typename Config::SharedStorage& storage) {
  constexpr int kReaders = Config::kConsumerWarps;
  storage.q_full.init(1);
  storage.q_empty.init(kReaders);
  initialize_stages(storage.tile_full, storage.tile_empty, kReaders + 2);  // and the loaders
  for (auto* ring : {&storage.keys, &storage.values}) {
    initialize_stages(ring->full, ring->empty, kReaders);
    for (auto& places : ring->places) {
      for (Place& place : places) {
        place = {0, 0};
      }
    }
  }
}

template <class Config>
__device__ __forceinline__ void consume_lists(const AttendParams& params,
                                              typename Config::SharedStorage& storage,
                                              const ConsumerThread& who) {
  using namespace cute;
  ListPipelines<Config> pipelines;
  const auto is_end = [&]() BSFA_INLINE_LAMBDA {
    wait(storage.q_full, pipelines.queries_phase());
    return read_flag(storage.tiles[pipelines.slot()].is_end);
  };
#pragma unroll 1
  while (!is_end()) {
    const int slot = pipelines.slot();
    const ListTile& tile = storage.tiles[slot];
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
  using Storage = typename Config::SharedStorage;
  const auto initialize = [&](Storage& storage) {
    prefetch(params);
    initialize_list_barriers<Config>(storage);
  };
  const auto produce = [&](Storage& storage, int warp) BSFA_INLINE_LAMBDA {
    produce_lists(ListProducer<Config>{params, storage}, params.order.attend, warp);
  };
  run_roles<Config>(initialize, produce, [&](Storage& storage, const ConsumerThread& who) BSFA_INLINE_LAMBDA {
    consume_lists<Config>(params.order.attend, storage, who);
  });
}

template <class Element, int kHeadDim>
void attend_blocks(const AttendParams& params, cudaStream_t stream) {
  using Config = ForwardConfig<Element, kHeadDim>;
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
  const int count_ctas = std::min((order.tiles + kCountWarps - 1) / kCountWarps, 8 * count_multiprocessors());
  launch<90>(count_blocks_kernel<Config>, dim3(count_ctas), kCountWarps * 32, 0, stream, order);
  const int sections = (order.schedule.kv_heads + order.schedule.section - 1) / order.schedule.section;
  launch<90>(order_tiles_kernel<Config>, dim3(sections), kOrderThreads, 0, stream, order);
  if (params.q_block == kAttendTileQ) {
    using SharedConfig = SharedListConfig<Element, kHeadDim>;
    launch_persistent<SharedConfig>(attend_shared_kernel<SharedConfig>, order.tiles, kernel_params, stream);
  } else {
    using OwnConfig = OwnListsConfig<Element, kHeadDim>;
    constexpr auto kernel = [] {
      if constexpr (OwnConfig::kStepBlocks == 1) {
        return attend_union_kernel<OwnConfig>;
      } else {
        return attend_kernel<OwnConfig>;
      }
    }();
    launch_persistent<OwnConfig>(kernel, order.tiles, kernel_params, stream);
  }
}

}  // namespace bsfa::sm90
