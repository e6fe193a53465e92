// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The kernel of sm_80 for attention over a block mask, and its launch: the dense loop of the forward kernel
// over a list of key blocks.
#pragma once

#include "../common/block_list.cuh"
#include "attend.hpp"
#include "forward.cuh"

namespace bsfa::sm80 {

template <class Element, int kHeadDim, Paging kPaging>
struct AttendConfig : ForwardConfig<Element, kHeadDim, kPaging> {
  using Forward = ForwardConfig<Element, kHeadDim, kPaging>;

  struct SharedStorage : Forward::SharedStorage {
    BlockList list;  // thread 0's, which alone walks it; as registers it would make others spill
    int listed[2];   // what it has found: of this step or the one after the next, and of the next
  };

  static_assert(kHeadDim != 128 || 2 * (sizeof(SharedStorage) + 1024) <= 164 * 1024);
};

template <class Config>
class AttendLoop : public Mainloop<Config> {
  using Base = Mainloop<Config>;
  using Base::block_;

 public:
  __device__ __forceinline__ AttendLoop(const AttendParams& params, typename Config::SharedStorage& storage,
                                        int half)
      : Base(params, storage, half), list_(storage.list), listed_(storage.listed), half_(half) {}

  // Takes in the key blocks of the list, which is walked two steps ahead. Each half of the warps computes the
  // blocks that its own query block attends.
  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0) {
      listed_[0] = list_.next();
      listed_[1] = list_.next();
    }
    __syncthreads();
    int current = listed_[0];
    int following = listed_[1];
    this->request_keys(current >> 2, 0);
    this->request_keys(following >> 2, 1);
    ptx::wait_for_copies<1>();
    __syncthreads();
    for (int step = 0; current >= 0; ++step) {
      if (threadIdx.x == 0) {
        listed_[step % 2] = list_.next();
      }
      const int key_block = current >> 2;
      const bool attends = (current >> half_ & 1) != 0;
      typename Base::Scores scores;
      float maxima[Base::kRows];
      if (attends) {
        this->score(scores, key_block, step);
        row_maxima(scores, maxima);
      }
      ptx::wait_for_copies<0>();  // the next block's K, which the barrier makes everybody's
      __syncthreads();
      this->request_values(key_block);
      const int later = listed_[step % 2];
      this->request_keys(later >> 2, step);
      if (attends) {
        if (threadIdx.x == block_.first_thread) {
          ++block_.kept;
        }
        this->exponentiate(scores, maxima);
      }
      ptx::wait_for_copies<1>();  // V
      __syncthreads();
      if (attends) {
        multiply_values<Config>(this->output, scores, this->values_address());
      }
      current = following;
      following = later;
    }
  }

 private:
  BlockList& list_;
  int* const listed_;
  const int half_;
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    attend_kernel(const __grid_constant__ AttendParams params, const __grid_constant__ Schedule schedule) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& storage = *reinterpret_cast<typename Config::SharedStorage*>(shared_memory);

  const auto find_block = [&](const QueryTile& tile, int first_query) {
    return find_attended_block(params, tile.sequence, first_query, is_poisoned(params, tile, first_query));
  };
  if (!begin_tile<Config>(params, schedule, storage, find_block)) {
    return;
  }
  const bool halved = params.q_block < Config::kTileQ;
  const int half = half_of_thread(params, Config::kTileQ, Config::kThreads);
  WarpsBlock& block = storage.blocks[half];
  const QueryBlock& first = storage.blocks[0];
  const QueryBlock& second = storage.blocks[halved ? 1 : 0];

  AttendLoop<Config> loop(params, storage, half);
  if (max(first.keys.visible, second.keys.visible) > 0) {
    loop.request_queries();
    if (threadIdx.x == 0) {
      storage.list = BlockList(params, storage.tile, first, second);
    }
    loop.run();
  }
  store_results<Config>(params, loop, storage, block);
}

template <class Element, int kHeadDim>
void attend_blocks(const AttendParams& params, cudaStream_t stream) {
  constexpr int kKeyBytes = 2 * kHeadDim * sizeof(Element);
  if (params.has_pages()) {
    using Config = AttendConfig<Element, kHeadDim, Paging::kAlways>;
    launch_over_tiles<Config>(attend_kernel<Config>, params, kKeyBytes, stream);
  } else {
    using Config = AttendConfig<Element, kHeadDim, Paging::kNever>;
    launch_over_tiles<Config>(attend_kernel<Config>, params, kKeyBytes, stream);
  }
}

}  // namespace bsfa::sm80
