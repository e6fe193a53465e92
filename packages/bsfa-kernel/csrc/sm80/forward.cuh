// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The forward kernel of sm_80 and its launch.
#pragma once

#include "../check.hpp"
#include "epilogue.cuh"
#include "forward.hpp"
#include "mainloop.cuh"

namespace bsfa::sm80 {

// The half of the tile's query blocks that the thread works on: in geometry 64x64 the tile holds two.
__device__ __forceinline__ int half_of_thread(const Problem& problem, int tile_q, int threads) {
  return problem.q_block < tile_q && static_cast<int>(threadIdx.x) >= threads / 2 ? 1 : 0;
}

// Finds the CTA's tile and makes it known to all threads. find_block(tile, first_query) finds a block of its
// queries. Returns whether there are any.
template <class Config, class FindBlock>
__device__ __forceinline__ bool begin_tile(const ForwardParams& params, const Schedule& schedule,
                                           typename Config::SharedStorage& storage,
                                           const FindBlock& find_block) {
  const QueryTile tile = find_tile(params, schedule, blockIdx.x, Config::kTileQ);
  if (params.has_spare_blocks() && params.kept != nullptr) {
    clear_spare_kept(params, tile, Config::kTileQ, threadIdx.x, Config::kThreads);
  }
  if (!tile.exists()) {
    return false;
  }
  const int half = half_of_thread(params, Config::kTileQ, Config::kThreads);
  if (threadIdx.x == half * (Config::kThreads / 2)) {
    const int first_query = tile.first_query + half * params.q_block;
    storage.blocks[half] = {find_block(tile, first_query), static_cast<int>(threadIdx.x), 0, -1};
  }
  if (threadIdx.x == 0) {
    storage.tile = tile;
    storage.keys = first_key_of(params, params.k, params.k_strides, tile);
    storage.values = first_key_of(params, params.v, params.v_strides, tile);
  }
  __syncthreads();
  return true;
}

// Writes what is asked for of the tile.
template <class Config, class Loop>
__device__ __forceinline__ void store_results(const ForwardParams& params, Loop& mainloop,
                                              typename Config::SharedStorage& storage,
                                              const WarpsBlock& block) {
  const float poison = is_poisoned(block) ? CUDART_NAN_F : 0.0f;  // makes NaN of what it is added to
  uint8_t* staging = reinterpret_cast<uint8_t*>(storage.q);
  const float sink = sink_of(params, storage.tile.head);
  stage_output<Config>(params, mainloop.output, mainloop.softmax, poison, sink, staging);
  store_output<Config>(params, storage.tile, staging);
  if (params.lse != nullptr) {
    store_lse<Config>(params, storage.tile, mainloop.softmax, poison, sink);
  }
  if (params.kept != nullptr && threadIdx.x == block.first_thread && block.index >= 0 &&
      block.index < storage.tile.sequence.blocks(params.q_block)) {
    *kept_of_block(params, storage.tile, block.index) = block.kept;
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    forward_kernel(const __grid_constant__ ForwardParams params, const __grid_constant__ Schedule schedule) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& storage = *reinterpret_cast<typename Config::SharedStorage*>(shared_memory);

  const auto find_block = [&](const QueryTile& tile, int first_query) {
    return find_query_block(params, tile.sequence, tile.head, first_query);
  };
  if (!begin_tile<Config>(params, schedule, storage, find_block)) {
    return;
  }
  const bool halved = params.q_block < Config::kTileQ;
  const int half = half_of_thread(params, Config::kTileQ, Config::kThreads);
  WarpsBlock& block = storage.blocks[half];
  const QueryBlock& other = storage.blocks[halved ? 1 - half : 0];
  const int visible = max(block.keys.visible, other.keys.visible);

  Mainloop<Config> mainloop(params, storage, half);
  if (visible > 0) {
    mainloop.request_queries();
    if (max(block.undecided, other.undecided) == 0) {
      mainloop.template run<false>(visible);
      block.kept = block.keys.visible;
    } else {
      mainloop.template run<true>(visible);
    }
  }
  store_results<Config>(params, mainloop, storage, block);
}

template <class Element, int kHeadDim>
void forward(const ForwardParams& params, cudaStream_t stream) {
  constexpr int kKeyBytes = 2 * kHeadDim * sizeof(Element);
  if (params.has_pages()) {
    using Config = ForwardConfig<Element, kHeadDim, Paging::kAlways>;
    launch_over_tiles<Config>(forward_kernel<Config>, params, kKeyBytes, stream);
  } else {
    using Config = ForwardConfig<Element, kHeadDim, Paging::kNever>;
    launch_over_tiles<Config>(forward_kernel<Config>, params, kKeyBytes, stream);
  }
}

}  // namespace bsfa::sm80
