// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The block mask seen by tiles, and the order in which tiles are taken: those with the most key blocks first
// in each section of the schedule, so that none is left alone at the end.
#pragma once

#include "../common/block_list.cuh"
#include "../common/ptx.cuh"
#include "attend_config.cuh"

namespace bsfa::sm90 {

struct OrderParams {
  AttendParams attend;
  Schedule schedule;
  int tiles;             // of all heads and sequences
  int* taken;            // by now, beyond each CTA's first
  TileLength* lengths;   // [tiles], by the schedule's index
  OrderedTile* ordered;  // [tiles]
};

inline constexpr int kPoisoned = -1;  // instead of a length: the outputs are NaN

__device__ __forceinline__ int first_query_of(const AttendParams& params, const QueryTile& tile,
                                              int consumer) {
  return tile.first_query + (params.q_block < kAttendTileQ ? consumer * params.q_block : 0);
}

__device__ __forceinline__ ConsumerBlock find_listed_block(const AttendParams& params,
                                                           const Sequence& sequence, int first_query,
                                                           bool is_poisoned) {
  return {find_attended_block(params, sequence, first_query, is_poisoned),
          sequence.has_query_in(first_query, params.q_block)};
}

// Finds how many key blocks each consumer attends to, a warp for each tile: even lanes for the first
// consumer, odd ones for the second.
template <class Config>
__global__ void __launch_bounds__(256) count_blocks_kernel(const __grid_constant__ OrderParams params) {
  ptx::wait_for_earlier_grids();
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *params.taken = 0;
  }
  constexpr int kLanes = 32 / Config::kConsumers;  // of each consumer
  const int lane = threadIdx.x % 32;
  const int consumer = lane % Config::kConsumers;
  const int warps = gridDim.x * blockDim.x / 32;
  for (int index = (blockIdx.x * blockDim.x + threadIdx.x) / 32; index < params.tiles; index += warps) {
    const QueryTile tile = find_tile(params.attend, params.schedule, index, kAttendTileQ);
    const int first_query = first_query_of(params.attend, tile, consumer);
    const bool poisoned = is_poisoned(params.attend, tile, first_query);
    const ConsumerBlock block = find_listed_block(params.attend, tile.sequence, first_query, poisoned);
    const int words = (block.keys.visible + kMaskBits - 1) / kMaskBits;
    int blocks = 0;
    if (words > 0) {
      const uint64_t* mask = find_words(params.attend, tile, block.index);
      for (int word = lane / Config::kConsumers; word < words; word += kLanes) {
        blocks += __popcll(visible_word(mask, word, block.keys.visible));
      }
    }
    __syncwarp();
    for (int distance = Config::kConsumers; distance < 32; distance *= 2) {
      blocks += __shfl_xor_sync(0xffffffff, blocks, distance);
    }
    if (lane < Config::kConsumers) {
      params.lengths[index].blocks[consumer] = poisoned ? kPoisoned : blocks;
    }
  }
}

inline constexpr int kOrderThreads = 1024;

// Puts the tiles of a section in order, a CTA for each section. Tiles of about the same length come in
// any order.
template <class Config>
__global__ void __launch_bounds__(kOrderThreads)
    order_tiles_kernel(const __grid_constant__ OrderParams params) {
  __shared__ int longest;
  __shared__ int places[kOrderThreads];  // of the tiles in each bucket; the longest are in the first
  __shared__ int warp_sums[32];
  ptx::wait_for_earlier_grids();
  const int thread = threadIdx.x;
  const Schedule& schedule = params.schedule;
  const int tiles_of_section = schedule.section * schedule.group * schedule.tiles;
  const int first = blockIdx.x * tiles_of_section;
  const int end = min(first + tiles_of_section, params.tiles);
  const auto length_of = [&](int index) {
    const TileLength length = params.lengths[index];
    return max(length.blocks[0], 0) + max(length.blocks[1], 0);
  };
  const auto bucket_of = [&](int index) {
    const int64_t length = length_of(index);
    return kOrderThreads - 1 - static_cast<int>(length * (kOrderThreads - 1) / max(longest, 1));
  };
  if (thread == 0) {
    longest = 0;
  }
  places[thread] = 0;
  __syncthreads();
  int my_longest = 0;
  for (int index = first + thread; index < end; index += kOrderThreads) {
    my_longest = max(my_longest, length_of(index));
  }
  atomicMax(&longest, my_longest);
  __syncthreads();
  for (int index = first + thread; index < end; index += kOrderThreads) {
    atomicAdd(&places[bucket_of(index)], 1);
  }
  __syncthreads();
  // Where each bucket begins.
  const int own = places[thread];
  int sum = own;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_up_sync(0xffffffff, sum, distance);
    sum += thread % 32 >= distance ? before : 0;
  }
  if (thread % 32 == 31) {
    warp_sums[thread / 32] = sum;
  }
  __syncthreads();
  for (int warp = 0; warp < thread / 32; ++warp) {
    sum += warp_sums[warp];
  }
  places[thread] = sum - own;
  __syncthreads();
  for (int index = first + thread; index < end; index += kOrderThreads) {
    params.ordered[first + atomicAdd(&places[bucket_of(index)], 1)] = {index, params.lengths[index], 0};
  }
}

}  // namespace bsfa::sm90
