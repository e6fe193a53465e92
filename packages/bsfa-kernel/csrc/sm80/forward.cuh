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

// Makes the tile known to all threads. `find_block(half)` finds a block of its queries.
template <class Config, class FindBlock>
__device__ __forceinline__ void publish_tile(const ForwardParams& params, const QueryTile& tile,
                                             typename Config::SharedStorage& storage,
                                             const FindBlock& find_block) {
  const int half = half_of_thread(params, Config::kTileQ, Config::kThreads);
  if (threadIdx.x == half * (Config::kThreads / 2)) {
    storage.blocks[half] = {find_block(half), static_cast<int>(threadIdx.x), 0, -1};
  }
  if (threadIdx.x == 0) {
    storage.tile = tile;
    storage.keys = first_key_of(params, params.k, params.k_strides, tile);
    storage.values = first_key_of(params, params.v, params.v_strides, tile);
  }
  __syncthreads();
}

// Writes what is asked for of the tile.
template <class Config, class Loop>
__device__ __forceinline__ void store_results(const ForwardParams& params, Loop& mainloop,
                                              typename Config::SharedStorage& storage,
                                              const WarpsBlock& block) {
  const float poison = is_poisoned(block) ? CUDART_NAN_F : 0.0f;  // makes NaN of what it is added to
  uint8_t* staging = storage.staging();
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

  const QueryTile tile = find_tile(params, schedule, blockIdx.x, Config::kTileQ);
  if (params.has_spare_blocks() && params.kept != nullptr) {
    clear_spare_kept(params, tile, Config::kTileQ, threadIdx.x, Config::kThreads);
  }
  if (!tile.exists()) {
    return;
  }
  publish_tile<Config>(params, tile, storage, [&](int half) {
    return find_query_block(params, tile.sequence, tile.head, tile.first_query + half * params.q_block);
  });
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

template <class Kernel>
void launch_forward(const ForwardParams& params, cudaStream_t stream) {
  const Schedule schedule = make_schedule(params, params.query_blocks(Kernel::kTileQ),
                                          2 * Kernel::kHeadDim * sizeof(typename Kernel::Element));
  constexpr int kSharedBytes = sizeof(typename Kernel::SharedStorage);
  const auto kernel = forward_kernel<Kernel>;
  BSFA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  kernel<<<static_cast<unsigned>(schedule.ctas()), Kernel::kThreads, kSharedBytes, stream>>>(params,
                                                                                             schedule);
  BSFA_CUDA_CHECK(cudaGetLastError());
}

template <class Element, int kHeadDim>
void forward(const ForwardParams& params, cudaStream_t stream) {
  if (params.has_pages()) {
    launch_forward<ForwardConfig<Element, kHeadDim, Paging::kAlways>>(params, stream);
  } else {
    launch_forward<ForwardConfig<Element, kHeadDim, Paging::kNever>>(params, stream);
  }
}

}  // namespace bsfa::sm80
