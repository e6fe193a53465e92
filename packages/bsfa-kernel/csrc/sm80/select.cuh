// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The selection kernel of sm_80 and its launch: the scores of the queries that vote, of which only the
// verdicts are written (docs/semantics.md).
#pragma once

#include <math_constants.h>

#include <climits>
#include <cstdint>
#include <type_traits>

#include "../check.hpp"
#include "../common/quantize.cuh"
#include "../common/select_work.cuh"
#include "../common/threshold.cuh"
#include "config.cuh"
#include "select.hpp"
#include "softmax.cuh"
#include "tiles.cuh"

namespace bsfa::sm80 {

// A tile of 128 voting rows. A row of 8-bit keys takes the 128 bytes of a row of 64 16-bit elements, at
// head_dim 64, too, where half of them stay empty.
template <class Element_, int kHeadDim_, bool kRounded_>
struct SelectConfig : Config<Element_, kHeadDim_> {
  using Base = Config<Element_, kHeadDim_>;
  static constexpr bool kRounded = kRounded_;
  static constexpr int kKeyStages = kRounded ? 4 : 2;
  static constexpr int kCtasPerSm = Base::kHeadDim == 64 || kRounded ? 3 : 2;
  static constexpr int kSlots = Base::kTileQ / kSlotRows;
  static constexpr int kWarpSlots = kSlots / Base::kWarps;
  static_assert(kWarpSlots == 2);

  // What load_tile() must know of a row of keys, in units of 16 bits.
  struct KeyRow {
    static constexpr int kHeadDim = kRounded ? Base::kHeadDim / 2 : Base::kHeadDim;
    static constexpr int kThreads = Base::kThreads;
    static constexpr Paging kPaging = Base::kPaging;
  };
  static constexpr int kKeyColumns = kRounded ? 64 : Base::kHeadDim;
  using KeyTile = SharedTile<Base::kTileK, kKeyColumns>;

  using Score = std::conditional_t<kRounded, int, float>;
  __device__ __forceinline__ static Score hidden_score() {
    if constexpr (kRounded) {
      return INT_MIN;
    } else {
      return -CUDART_INF_F;
    }
  }

  struct SharedStorage {
    alignas(1024) uint16_t k[kKeyStages][Base::kTileK * kKeyColumns];
    alignas(1024) uint16_t q[kRounded ? 8 : Base::kTileQ * Base::kHeadDim];
  };
};

// sums (16 x 8) += left (16 x 32) * right^T (8 x 32), of 8-bit integers.
__device__ __forceinline__ void multiply_bytes(int (&sums)[4], const uint32_t (&left)[4], uint32_t right_low,
                                               uint32_t right_high) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_low), "r"(right_high));
}

// A warp's 32 voting rows, of two slots. A lane follows one: lane i of a quad the row that is row i of its
// threads' accumulators, so that lanes 0 and 1 are of the first slot.
template <class Config>
class WarpVoters {
  using Element = typename Config::Element;
  using Score = typename Config::Score;
  using Scores = Accumulators<Config::kRowBlocks, Config::kTileK / 8, Score>;
  static constexpr int kRows = Config::kThreadRows;
  static constexpr uint32_t kFirstSlot = 0x33333333;  // lanes
  static_assert(kRows == 4);

 public:
  __device__ __forceinline__ WarpVoters(const SelectParams& params, const RoundedKeys& rounded,
                                        const SelectTile& tile, typename Config::SharedStorage& storage)
      : params_(params),
        tile_(tile),
        storage_(storage),
        sees_{tile.sequence.seqlen_q, tile.sequence.seqlen_k, params.causal},
        slots_{find_slot(params, tile, threadIdx.x / 32 * 2),
               find_slot(params, tile, threadIdx.x / 32 * 2 + 1)},
        reference_(RowReference::first(params, tile.head)) {
    const Slot slot = find_slot(params, tile, threadIdx.x / 32 * 2 + lane_slot());
    const int query = slot.query(lane_row());
    const bool exists = slot.exists && tile.sequence.has_query(query);
    // attend_blocks poisons what a block with a threshold of NaN gives: here it keeps everything.
    threshold_ = isnan(slot.threshold) ? -CUDART_INF_F : slot.threshold;
    votes_ = exists && threshold_ < CUDART_INF_F;
    visible_ = slot.exists ? slot.keys.visible : 0;
    full_ = slot.keys.full;
    if constexpr (Config::kRounded) {
      load_rounded_queries(rounded);
      keys_ = reinterpret_cast<const uint16_t*>(
          rounded.key_of(params, tile.sequence, tile.kv_head, Config::kHeadDim, 0));
      key_scales_ = reinterpret_cast<const float*>(rounded.scales_of(params, tile.sequence, tile.kv_head));
    } else {
      keys_ = first_key_of(params, params.k, params.k_strides, {tile.sequence, tile.head, tile.kv_head, 0});
      request_queries();
    }
  }

  // Votes on the key blocks [0, visible) of the tile, from the last to the first, and writes the verdicts.
  __device__ __forceinline__ void run(int visible) {
    const int full = __reduce_min_sync(0xffffffff, full_);
    uint64_t kept[2] = {0, 0};  // of a word of the mask, for each slot
#pragma unroll
    for (int stage = 1; stage < Config::kKeyStages; ++stage) {
      request_keys(visible - stage);
    }
    for (int key_block = visible - 1; key_block >= 0; --key_block) {
      ptx::wait_for_copies<Config::kKeyStages - 2>();
      __syncthreads();
      request_keys(key_block - Config::kKeyStages + 1);
      Scores scores;
      score(scores, key_block);
      if (key_block >= full) {
        ptx::keep_branch();
        mask(scores, key_block);
      }
      const Score largest = largest_of_row(scores);
      float peak = static_cast<float>(largest) * scale_;
      if constexpr (Config::kRounded) {
        peak = largest == Config::hidden_score()
                   ? -CUDART_INF_F
                   : fmaf(peak, key_scales_[key_block / 2 * 4 + key_block % 2], offset_score_);
      }
      const bool reaches = votes_ && !(reference_.excess(peak) < threshold_);
      if (params_.rule != Rule::kAbsolute) {
        reference_.take(params_.rule, peak);
      }
      const bool keeps = key_block < visible_ && (key_block >= full_ || reaches);
      const uint32_t lanes = __ballot_sync(0xffffffff, keeps);
      const uint64_t bit = uint64_t{1} << key_block % kMaskBits;
      kept[0] |= (lanes & kFirstSlot) != 0 ? bit : 0;
      kept[1] |= (lanes & ~kFirstSlot) != 0 ? bit : 0;
      if (key_block % kMaskBits == 0) {
        store(0, kept[0], key_block / kMaskBits);
        store(1, kept[1], key_block / kMaskBits);
        kept[0] = kept[1] = 0;
      }
    }
  }

 private:
  __device__ __forceinline__ static int lane_slot() { return threadIdx.x % 4 / 2; }
  __device__ __forceinline__ static int lane_row() { return threadIdx.x % 32 / 4 + threadIdx.x % 2 * 8; }
  // The query of the thread's accumulators' row `row`.
  __device__ __forceinline__ int query(int row) const {
    return slots_[row / 2].query(threadIdx.x % 32 / 4 + row % 2 * 8);
  }
  __device__ __forceinline__ bool exists(int row) const {
    return slots_[row / 2].exists && tile_.sequence.has_query(query(row));
  }
  const __device__ __forceinline__ Element* query_data(int row) const {
    return find_row(static_cast<const Element*>(params_.q), params_.q_strides, tile_.sequence,
                    query_row(tile_.sequence, exists(row) ? query(row) : 0), tile_.head);
  }

  __device__ __forceinline__ void load_rounded_queries(const RoundedKeys& rounded) {
    const float* offsets = params_.needs_offset_scores()
                               ? rounded.offsets_of(params_, tile_.sequence, tile_.kv_head, Config::kHeadDim)
                               : nullptr;
#pragma unroll
    for (int slot = 0; slot < Config::kWarpSlots; ++slot) {
      const Element* const from[2] = {query_data(2 * slot), query_data(2 * slot + 1)};
      const bool exist[2] = {exists(2 * slot), exists(2 * slot + 1)};
      round_rows<Config::kHeadDim>(from, exist, params_.head_dim, offsets, queries_[slot]);
    }
    const bool second = threadIdx.x % 2 != 0;
    const auto of_lane = [&](const float (&first)[2], const float (&last)[2]) {
      const float low = second ? first[1] : first[0];
      const float high = second ? last[1] : last[0];
      return params_.scale * (lane_slot() == 0 ? low : high);
    };
    scale_ = of_lane(queries_[0].scale, queries_[1].scale);
    offset_score_ = of_lane(queries_[0].offset_score, queries_[1].offset_score);
  }

  // 16-bit queries go to shared memory, row by row of each slot.
  __device__ __forceinline__ void request_queries() {
    scale_ = params_.scale;
    constexpr int kThreadsOfRow = Config::kHeadDim / 8;
    constexpr int kRowsOfStep = 32 / kThreadsOfRow;
    const int lane = threadIdx.x % 32;
    const int chunk = lane % kThreadsOfRow;
#pragma unroll
    for (int step = 0; step < Config::kWarpRows; step += kRowsOfStep) {
      const int row = step + lane / kThreadsOfRow;
      const Slot& slot = slots_[step / kSlotRows];
      const int query = slot.query(step % kSlotRows + lane / kThreadsOfRow);
      const bool exists = slot.exists && tile_.sequence.has_query(query) && chunk * 8 < params_.head_dim;
      const Element* from =
          find_row(static_cast<const Element*>(params_.q), params_.q_strides, tile_.sequence,
                   query_row(tile_.sequence, exists ? query : 0), tile_.head);
      ptx::copy_async_or_zero(
          ptx::shared_address(storage_.q) +
              SharedQueries<Config>::offset(threadIdx.x / 32 * Config::kWarpRows + row, chunk),
          from + chunk * 8, exists);
    }
  }

  __device__ __forceinline__ uint32_t keys_address(int key_block) const {
    return ptx::shared_address(storage_.k[key_block % Config::kKeyStages]);
  }

  // A group of copies is closed even where there is nothing to copy, so that the waits count the same.
  __device__ __forceinline__ void request_keys(int key_block) {
    if (key_block >= 0) {
      if constexpr (Config::kRounded) {
        load_tile<typename Config::KeyRow, typename Config::KeyTile>(
            keys_address(key_block), keys_, Config::KeyRow::kHeadDim, key_block * Config::kTileK,
            tile_.sequence.seqlen_k, Config::KeyRow::kHeadDim);
      } else {
        load_keys<typename Config::KeyRow, typename Config::KeyTile>(
            params_, tile_.sequence, keys_address(key_block), keys_, params_.k_strides,
            key_block * Config::kTileK);
      }
    }
    ptx::commit_copies();
  }

  __device__ __forceinline__ void score(Scores& scores, int key_block) const {
    using KeyTile = typename Config::KeyTile;
    const uint32_t lane_keys = keys_address(key_block) + KeyTile::lane_of_right();
    if constexpr (Config::kRounded) {
      scores.clear();
#pragma unroll
      for (int step = 0; step < Config::kHeadDim / 32; ++step) {
#pragma unroll
        for (int column = 0; column < Config::kTileK / 16; ++column) {
          uint32_t keys[4];
          ptx::load_matrices(keys, KeyTile::at(lane_keys, column, step));
#pragma unroll
          for (int slot = 0; slot < Config::kWarpSlots; ++slot) {
            multiply_bytes(scores.block[slot][2 * column], queries_[slot].words[step], keys[0], keys[1]);
            multiply_bytes(scores.block[slot][2 * column + 1], queries_[slot].words[step], keys[2], keys[3]);
          }
        }
      }
    } else {
      const uint32_t lane_queries = ptx::shared_address(storage_.q) + SharedQueries<Config>::lane_of_left() +
                                    threadIdx.x / 32 * (Config::kWarpRows * SharedQueries<Config>::kRowBytes);
      multiply_scores<Config>(scores, lane_queries, lane_keys);
    }
  }

  __device__ __forceinline__ void mask(Scores& scores, int key_block) const {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const int end = sees_.keys(query(row)) - key_block * Config::kTileK - scores.column_of_warp(0);
#pragma unroll
      for (int column = 0; column < scores.kColumns; ++column) {
        if (column / 2 * 8 + column % 2 >= end) {
          scores(row, column) = Config::hidden_score();
        }
      }
    }
  }

  // Of the row that the lane follows.
  __device__ __forceinline__ Score largest_of_row(Scores& scores) const {
    Score largest[kRows];
    if constexpr (Config::kRounded) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        largest[row] = scores(row, 0);
#pragma unroll
        for (int column = 1; column < scores.kColumns; ++column) {
          largest[row] = max(largest[row], scores(row, column));
        }
      }
    } else {
      row_maxima(scores, largest);
    }
    return quad_row_max(largest);
  }

  // Adds to a word of a query block's mask, of which other warps can have a part.
  __device__ __forceinline__ void store(int slot, uint64_t kept, int word) const {
    if (threadIdx.x % 32 == 0 && kept != 0) {
      uint64_t* words = words_of_block(params_, params_.block_mask, params_.mask_words, tile_.sequence,
                                       tile_.head, slots_[slot].block);
      atomicOr(reinterpret_cast<unsigned long long*>(words + word), static_cast<unsigned long long>(kept));
    }
  }

  const SelectParams& params_;
  const SelectTile& tile_;
  typename Config::SharedStorage& storage_;
  const Visibility sees_;
  const Slot slots_[Config::kWarpSlots];
  const uint16_t* keys_;  // of the sequence and kv head: the rounded ones, or by first_key_of()
  const float* key_scales_;
  RoundedRows<Config::kHeadDim> queries_[Config::kRounded ? Config::kWarpSlots : 1];

  // Of the row that the lane follows.
  bool votes_;
  float threshold_;
  int visible_;
  int full_;
  float scale_;  // of its scores, times that of the key block
  float offset_score_;
  RowReference reference_;
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    select_kernel(const __grid_constant__ SelectParams params, const __grid_constant__ RoundedKeys rounded,
                  const __grid_constant__ Schedule schedule) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& storage = *reinterpret_cast<typename Config::SharedStorage*>(shared_memory);
  const SelectTile tile = find_select_tile(params, schedule, blockIdx.x, Config::kSlots);
  if (!tile.exists) {
    return;
  }
  const int lane = threadIdx.x % 32;
  const SelectWork work = find_select_work(params, tile, Config::kSlots, lane);
  if (work.votes) {
    WarpVoters<Config> voters(params, rounded, tile, storage);
    voters.run(__shfl_sync(0xffffffff, find_slot(params, tile, Config::kSlots - 1).keys.visible, 0));
  } else {
    for (int slot = threadIdx.x / 32; slot < Config::kSlots; slot += Config::kWarps) {
      fill_slot(params, tile, find_slot(params, tile, slot), work, lane);
    }
  }
}

template <class Config>
void select_with(const SelectParams& params, cudaStream_t stream) {
  RoundedKeys rounded{};
  if constexpr (Config::kRounded) {
    rounded = {make_select_workspace(params, Config::kHeadDim), params.workspace};
    round_keys<80, typename Config::Element, Config::kHeadDim>(params, rounded, stream);
  }
  const Schedule schedule =
      make_select_schedule(params, Config::kSlots, sizeof(uint16_t) * Config::KeyRow::kHeadDim);
  launch<80>(select_kernel<Config>, dim3(static_cast<unsigned>(schedule.ctas())), Config::kThreads,
             sizeof(typename Config::SharedStorage), stream, params, rounded, schedule);
}

template <class Element, int kHeadDim>
void select_blocks(const SelectParams& params, cudaStream_t stream) {
  if (!clear_block_mask(params, stream)) {
    return;
  }
  if (params.precision == Precision::kInt8) {
    select_with<SelectConfig<Element, kHeadDim, true>>(params, stream);
  } else {
    select_with<SelectConfig<Element, kHeadDim, false>>(params, stream);
  }
}

}  // namespace bsfa::sm80
