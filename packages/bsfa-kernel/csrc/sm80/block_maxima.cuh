// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The block maxima kernel of sm_80 and its launch: the scores of the forward kernel, of which only the
// largest excess of a block over its rows' references is written (docs/semantics.md).
#pragma once

#include <math_constants.h>

#include <cstdint>

#include "../check.hpp"
#include "../common/layout.cuh"
#include "../common/mask.cuh"
#include "../common/threshold.cuh"
#include "block_maxima.hpp"
#include "config.cuh"
#include "softmax.cuh"
#include "tiles.cuh"

namespace bsfa::sm80 {

// The largest x of the warp, or NaN.
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    x = ptx::max_nan(x, __shfl_xor_sync(0xffffffff, x, distance));
  }
  return x;
}

template <class Config>
class BlockMaxima {
  using Scores = Accumulators<Config::kRowBlocks, Config::kTileK / 8>;
  static constexpr int kRows = Config::kThreadRows;

 public:
  __device__ __forceinline__ BlockMaxima(const BlockMaximaParams& params, const QueryTile& tile,
                                         typename Config::SharedStorage& storage)
      : params_(params),
        storage_(storage),
        sequence_(tile.sequence),
        sees_{tile.sequence.seqlen_q, tile.sequence.seqlen_k, params.causal},
        first_query_(tile.first_query),
        maxima_(params.maxima +
                (int64_t{tile.sequence.index} * params.heads + tile.head) * q_blocks() * k_blocks()),
        keys_(first_key_of(params, params.k, params.k_strides, tile)),
        queries_(first_query_of(params, tile)),
        reference_(RowReference::first(params, tile.head)) {}

  __device__ __forceinline__ void run() {
    const KeyBlocks tile_keys =
        sequence_.oversized ? KeyBlocks{0, 0} : key_blocks(sees_, first_query_, Config::kTileQ);
    for (int key_block = tile_keys.visible + threadIdx.x; key_block < k_blocks();
         key_block += Config::kThreads) {
      for (int half = 0; half < Config::kTileQ / params_.q_block; ++half) {
        const bool poisoned = sequence_.oversized &&
                              sequence_.has_query_in(first_query_ + half * params_.q_block, params_.q_block);
        store(half, key_block, poisoned ? CUDART_NAN_F : -CUDART_INF_F);
      }
    }
    if (tile_keys.visible == 0) {
      return;
    }
    load_tile<Config, SharedQueries<Config>>(ptx::shared_address(storage_.q), queries_,
                                             params_.q_strides.seqlen, first_query_, sequence_.seqlen_q,
                                             params_.head_dim);
    request_keys(tile_keys.visible - 1);
    for (int key_block = tile_keys.visible - 1; key_block >= 0; --key_block) {
      ptx::wait_for_copies<0>();
      __syncthreads();
      request_keys(key_block - 1);
      store_previous(key_block + 1, tile_keys.visible);
      Scores scores;
      const uint32_t lane_queries = ptx::shared_address(storage_.q) + SharedQueries<Config>::lane_of_left() +
                                    threadIdx.x / 32 * (Config::kWarpRows * SharedQueries<Config>::kRowBytes);
      multiply_scores<Config>(scores, lane_queries,
                              keys_address(key_block) + SharedKeys<Config>::lane_of_right());
      if (key_block >= tile_keys.full) {
        ptx::keep_branch();
        mask(scores, key_block);
      }
      const float excess = warp_max(take(scores));
      if (threadIdx.x % 32 == 0) {
        storage_.excess[key_block % 2][threadIdx.x / 32] = excess;
      }
    }
    __syncthreads();
    store_previous(0, tile_keys.visible);
  }

 private:
  __device__ __forceinline__ int q_blocks() const { return params_.query_blocks(params_.q_block); }
  __device__ __forceinline__ int k_blocks() const { return (params_.seqlen_k + kKeyBlock - 1) / kKeyBlock; }

  __device__ __forceinline__ uint32_t keys_address(int key_block) const {
    return ptx::shared_address(storage_.k[key_block % Config::kKeyStages]);
  }

  __device__ __forceinline__ void request_keys(int key_block) const {
    if (key_block >= 0) {
      load_keys<Config, SharedKeys<Config>>(params_, sequence_, keys_address(key_block), keys_,
                                            params_.k_strides, key_block * Config::kTileK);
    }
    ptx::commit_copies();
  }

  // -inf for keys that a query does not see.
  __device__ __forceinline__ void mask(Scores& scores, int key_block) const {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const int query = first_query_ + threadIdx.x / 32 * Config::kWarpRows + scores.row_of_warp(row);
      const int end = sees_.keys(query) - key_block * Config::kTileK - scores.column_of_warp(0);
#pragma unroll
      for (int column = 0; column < scores.kColumns; ++column) {
        if (column / 2 * 8 + column % 2 >= end) {
          scores(row, column) = -CUDART_INF_F;
        }
      }
    }
  }

  // How far the peak of the thread's row, one of the four that its quad shares, is above the row's reference,
  // which then takes it in.
  __device__ __forceinline__ float take(Scores& scores) {
    float maxima[kRows];
    row_maxima(scores, maxima);
    const float peak = params_.scale * quad_row_max(maxima);
    const int query =
        first_query_ + threadIdx.x / 32 * Config::kWarpRows + scores.row_of_warp(threadIdx.x % kRows);
    const bool counts = peak != -CUDART_INF_F && sequence_.has_query(query);
    const float excess = counts ? reference_.excess(peak) : -CUDART_INF_F;
    if (params_.rule != Rule::kAbsolute) {
      reference_.take(params_.rule, peak);
    }
    return excess;
  }

  // Writes the maxima of a key block that all warps are done with.
  __device__ __forceinline__ void store_previous(int key_block, int visible) const {
    const int halves = Config::kTileQ / params_.q_block;
    if (key_block >= visible || threadIdx.x >= halves) {
      return;
    }
    const int warps = Config::kWarps / halves;
    float excess = -CUDART_INF_F;
    for (int warp = 0; warp < warps; ++warp) {
      excess = ptx::max_nan(excess, storage_.excess[key_block % 2][threadIdx.x * warps + warp]);
    }
    store(threadIdx.x, key_block, excess);
  }

  __device__ __forceinline__ void store(int half, int key_block, float excess) const {
    const int q_block = sequence_.block_at(first_query_ + half * params_.q_block, params_.q_block);
    if (q_block >= 0 && q_block < q_blocks()) {
      maxima_[int64_t{q_block} * k_blocks() + key_block] = excess;
    }
  }

  const BlockMaximaParams& params_;
  typename Config::SharedStorage& storage_;
  const Sequence sequence_;
  const Visibility sees_;
  const int first_query_;
  float* const maxima_;            // of the head, [q_blocks, k_blocks]
  const uint16_t* const keys_;     // of the sequence and kv head, by first_key_of()
  const uint16_t* const queries_;  // [seqlen_q, head_dim] of the head
  RowReference reference_;         // of the thread's row
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    block_maxima_kernel(const __grid_constant__ BlockMaximaParams params,
                        const __grid_constant__ Schedule schedule) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& storage = *reinterpret_cast<typename Config::SharedStorage*>(shared_memory);
  BlockMaxima<Config>(params, find_tile(params, schedule, blockIdx.x, Config::kTileQ), storage).run();
}

template <class Element, int kHeadDim>
void block_maxima(const BlockMaximaParams& params, cudaStream_t stream) {
  using Kernel = BlockMaximaConfig<Element, kHeadDim>;
  launch_over_tiles<Kernel>(block_maxima_kernel<Kernel>, params, kHeadDim * sizeof(Element), stream);
}

}  // namespace bsfa::sm80
