// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The forward kernel of sm_90a and its launch. docs/kernel-sm90.md has the schedule of copies and barriers.
#pragma once

#include "dense_single.cuh"
#include "epilogue.cuh"
#include "forward.hpp"
#include "producer.cuh"
#include "roles.cuh"
#include "sparse.cuh"

namespace bsfa::sm90 {

// A tile with something to vote on, or without keys.
template <class Config>
__device__ __forceinline__ void attend_voting(typename Config::SharedStorage& storage,
                                              ConsumerPipelines<Config>& pipelines,
                                              const ForwardParams& params, const ConsumerThread& who) {
  using namespace cute;
  typename Config::ValuesMma values_mma;
  auto output = partition_fragment_C(values_mma, Shape<_64, Int<Config::kHeadDim>>{});
  clear(output);
  Softmax softmax;
  int kept = 0;
  const Tile& published = pipelines.published_tile(storage);
  {
    Tile tile = published;
    tile.key_blocks = uniform(tile.key_blocks);
    tile.full = uniform(tile.full);
    const ConsumerBlock block = tile.block_of(who.warpgroup);
    const TileContext<Config> context{storage, pipelines, params, tile, block, who};
    if (tile.key_blocks == 0) {
      __syncwarp();  // all lanes have read what the tile is
      release(storage.q_empty, who);
    } else if (params.rule != Rule::kAbsolute) {
      kept = attend_sparse<Config, Bounds::kRelative>(context, output, softmax);
    } else if (uniform(block.threshold > 0.0f)) {
      kept = attend_sparse<Config, Bounds::kPositive>(context, output, softmax);
    } else {
      kept = attend_sparse<Config, Bounds::kNotPositive>(context, output, softmax);
    }
    if (!Config::kSparseQueriesInRegisters && tile.key_blocks > 0) {
      release(storage.q_empty, who);
    }
  }
  pipelines.queries.advance();
  // Once more: the passes have no registers for what the epilogue needs to know.
  const Tile tile = published;
  const ConsumerBlock block = tile.block_of(who.warpgroup);
  const TileContext<Config> context{storage, pipelines, params, tile, block, who};
  store_results<Config>(context, output, softmax, kept);
}

template <class Config>
__device__ __forceinline__ void consume(const KernelParams& params, typename Config::SharedStorage& storage,
                                        const ConsumerThread& who) {
  ConsumerPipelines<Config> pipelines;
  if (who.warpgroup == 1) {
    pingpong_signal(1);  // consumer 0 goes first
  }
  int tiles = 0;  // of this CTA
  for_each_index(params.tiles, [&](int) { ++tiles; });
#pragma unroll 1
  while (tiles > 0) {
    wait(storage.q_full, pipelines.queries.phase());
    const Tile& published = pipelines.published_tile(storage);
    if (uniform(published.dense && published.key_blocks > 0)) {
      tiles = attend_dense_tiles<Config>(storage, pipelines, params.forward, who, tiles);
    } else {
      attend_voting<Config>(storage, pipelines, params.forward, who);
      --tiles;
    }
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    forward_kernel(const __grid_constant__ KernelParams params) {
  using Storage = typename Config::SharedStorage;
  const auto initialize = [&](Storage& storage) {
    prefetch(params);
    initialize_barriers<Config>(storage);
    initialize_found(storage.found, Producer<Config>::key_loaders(params.forward) + 1);
  };
  const auto produce = [&](Storage& storage, int warp) BSFA_INLINE_LAMBDA {
    const Producer<Config> producer{params, storage};
    const bool has_pages = params.forward.has_pages();
    if (warp == 3) {
      if (has_pages) {
        producer.find_pages();
      }
    } else if (ptx::is_elected()) {
      if (has_pages) {
        if (warp == 0) {
          producer.template load_queries_and_keys<true>();
        } else if (warp == 1) {
          producer.template load_values<true>();
        } else if (producer.key_loaders(params.forward) == 2) {
          producer.load_other_keys();
        }
      } else if (warp == 0) {
        producer.template load_queries_and_keys<false>();
      } else if (warp == 1) {
        producer.template load_values<false>();
      }
    }
  };
  run_roles<Config>(initialize, produce, [&](Storage& storage, const ConsumerThread& who) BSFA_INLINE_LAMBDA {
    consume<Config>(params, storage, who);
  });
}

template <class Config>
KernelParams make_kernel_params(const ForwardParams& params) {
  using Element = typename Config::Element;
  KernelParams kernel_params;
  kernel_params.forward = params;
  kernel_params.schedule =
      make_schedule(params, params.query_blocks(Config::kTileQ), 2 * Config::kHeadDim * sizeof(Element));
  kernel_params.tiles = static_cast<int>(kernel_params.schedule.ctas());
  static_cast<TensorMaps&>(kernel_params) = make_tensor_maps<Element>(params, kKeyBlock, Config::kBoxColumns);
  return kernel_params;
}

template <class Element, int kHeadDim>
void forward(const ForwardParams& params, cudaStream_t stream) {
  using Config = ForwardConfig<Element, kHeadDim>;
  const KernelParams kernel_params = make_kernel_params<Config>(params);
  launch_persistent<Config>(forward_kernel<Config>, kernel_params.tiles, kernel_params, stream);
}

}  // namespace bsfa::sm90
