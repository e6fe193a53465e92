// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The forward kernel of sm_80 and its launch.
#pragma once

#include "../check.hpp"
#include "epilogue.cuh"
#include "forward.hpp"
#include "mainloop.cuh"

namespace bsfa::sm80 {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    forward_kernel(const __grid_constant__ ForwardParams params, const __grid_constant__ Schedule schedule) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& storage = *reinterpret_cast<typename Config::SharedStorage*>(shared_memory);

  const QueryTile tile = find_tile(params, schedule, blockIdx.x, Config::kTileQ);
  if (params.is_packed() && params.kept != nullptr) {
    clear_spare_kept(params, tile, Config::kTileQ, threadIdx.x, Config::kThreads);
  }
  if (!tile.exists()) {
    return;
  }
  // In geometry 64x64 the tile holds two blocks of queries: the warp's and the other one.
  const bool halved = params.q_block < Config::kTileQ;
  const int half = halved && threadIdx.x >= Config::kThreads / 2 ? 1 : 0;
  if (threadIdx.x == half * (Config::kThreads / 2)) {
    storage.blocks[half] = find_warps_block(params, tile, half);
  }
  if (threadIdx.x == 0) {
    storage.tile = tile;
    const int row = key_row(tile.sequence, 0);
    storage.keys = first_element(params, params.k, params.k_strides, tile.sequence, row, tile.kv_head);
    storage.values = first_element(params, params.v, params.v_strides, tile.sequence, row, tile.kv_head);
  }
  __syncthreads();
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

  const float poison = is_poisoned(block) ? CUDART_NAN_F : 0.0f;  // makes NaN of what it is added to
  uint8_t* staging = reinterpret_cast<uint8_t*>(storage.q);
  stage_output<Config>(mainloop.output, mainloop.softmax, poison, staging);
  store_output<Config>(params, storage.tile, staging);
  if (params.lse != nullptr) {
    store_lse<Config>(params, storage.tile, mainloop.softmax, poison);
  }
  const bool exists = block.index * params.q_block < storage.tile.sequence.seqlen_q;
  if (params.kept != nullptr && exists && threadIdx.x == block.first_thread) {
    *kept_of_block(params, storage.tile, block.index) = block.kept;
  }
}

template <class Element, int kHeadDim>
void forward(const ForwardParams& params, cudaStream_t stream) {
  using Kernel = ForwardConfig<Element, kHeadDim>;
  const Schedule schedule = make_schedule(params, Kernel::kTileQ, 2 * kHeadDim * sizeof(Element));
  constexpr int kSharedBytes = sizeof(typename Kernel::SharedStorage);
  const auto kernel = forward_kernel<Kernel>;
  BSFA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  kernel<<<static_cast<unsigned>(schedule.ctas()), Kernel::kThreads, kSharedBytes, stream>>>(params,
                                                                                             schedule);
  BSFA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace bsfa::sm80
