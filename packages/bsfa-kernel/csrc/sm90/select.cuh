// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The selection kernel of sm_90a and its launch. docs/kernel-select.md says who does what.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "consumer.cuh"
#include "key_pages.cuh"
#include "roles.cuh"
#include "select_rows.cuh"

namespace bsfa::sm90 {

struct SelectKernelParams {
  CUtensorMap k;  // (column, row, head, batch); of 16-bit keys in pages (column, row, head, page)
  SelectParams select;
  RoundedKeys rounded;
  Schedule schedule;
  int tiles;  // of all heads and sequences
};

// Loads the key tiles of all work tiles: one warp, of which one lane speaks to the copy engine.
template <class Config>
__device__ __forceinline__ void load_key_tiles(const SelectKernelParams& params,
                                               typename Config::SharedStorage& storage, int lane) {
  PipelineState<Config::kStages> keys;
  for_each_index(params.tiles, [&](int index) BSFA_INLINE_LAMBDA {
    const SelectTile tile = find_select_tile(params.select, params.schedule, index, Config::kSlots);
    if (!tile.exists) {
      return;
    }
    const SelectWork work = find_select_work(params.select, tile, Config::kSlots, lane);
    if (!work.votes) {
      return;
    }
    const int batch = key_batch(params.select, tile.sequence);
    const bool in_pages = !Config::kRounded && params.select.has_pages();
    const PagedLoads<Config::kTileKeys> loads(params.select, tile.sequence);
    PagedRow next{};  // of the next key tile
    if (in_pages) {
      next = loads.find((work.key_tiles - 1) * Config::kTileKeys);
    }
    const float4* scales =
        Config::kRounded ? params.rounded.scales_of(params.select, tile.sequence, tile.kv_head) : nullptr;
#pragma unroll 1
    for (int key_tile = work.key_tiles - 1; key_tile >= 0; --key_tile) {
      const int stage = keys.stage();
      const PagedRow found = next;
      if (in_pages && key_tile > 0) {
        next = loads.find((key_tile - 1) * Config::kTileKeys);
      }
      wait(storage.k_empty[stage], keys.phase() ^ 1);
      if (ptx::is_elected()) {
        auto* full = reinterpret_cast<uint64_t*>(&storage.k_full[stage]);
        storage.k_full[stage].arrive_and_expect_tx(Config::kStageBytes);
        for (int box = 0; box < (in_pages ? 0 : Config::kBoxes); ++box) {
          cute::SM90_TMA_LOAD_4D::copy(
              &params.k, full, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST),
              storage.k + stage * Config::kTileElements + box * Config::kBoxElements,
              box * Config::kBoxColumns, key_row(tile.sequence, kTileBlocks * key_tile), tile.kv_head, batch);
        }
        if constexpr (Config::kRounded) {
          cute::SM90_BULK_COPY_G2S::copy(scales + key_tile, full, storage.key_scales[stage], sizeof(float4));
        }
      }
      __syncwarp();
      if (in_pages) {
        loads.template load<Config::kBoxes, Config::kBoxColumns>(
            params.k, storage.k_full[stage], found, tile.kv_head, storage.k + stage * Config::kTileElements,
            Config::kBoxElements);
      }
      keys.advance();
    }
  });
}

// The bits of x at the even places of the result.
__device__ __forceinline__ uint64_t spread_bits(uint32_t x) {
  uint64_t bits = x;
  bits = (bits | bits << 16) & 0x0000ffff0000ffff;
  bits = (bits | bits << 8) & 0x00ff00ff00ff00ff;
  bits = (bits | bits << 4) & 0x0f0f0f0f0f0f0f0f;
  bits = (bits | bits << 2) & 0x3333333333333333;
  return (bits | bits << 1) & 0x5555555555555555;
}

// Adds what a slot's rows have voted on 32 key tiles to a word of the mask. `votes`: the lane's own, bit i on
// its block of the word's tile i.
__device__ __forceinline__ void add_votes(uint64_t* words, int word, uint32_t votes, const VoterLane& voter) {
  const uint32_t even = __reduce_or_sync(0xffffffff, voter.key_block() == 0 ? votes : 0);
  const uint32_t odd = __reduce_or_sync(0xffffffff, voter.key_block() == 1 ? votes : 0);
  if (voter.lane == 0 && (even | odd) != 0) {
    atomicOr(reinterpret_cast<unsigned long long*>(words + word),
             static_cast<unsigned long long>(spread_bits(even) | spread_bits(odd) << 1));
  }
}

// A consumer warpgroup's part of a tile with something to vote on.
template <class Config, Rule kRule>
__device__ __forceinline__ void vote_on_tile(const SelectKernelParams& params,
                                             typename Config::SharedStorage& storage,
                                             PipelineState<Config::kStages>& keys, const SelectTile& tile,
                                             const SelectWork& work, const ConsumerThread& who) {
  using namespace cute;
  using Value = typename Config::Accumulator;
  constexpr int kTileKeys = Config::kTileKeys;
  typename Config::Mma mma;
  const auto slice = mma.get_slice(who.thread);
  const auto smem_k = make_tensor(make_smem_ptr(storage.k), typename Config::SmemK{});
  const auto tSrK = slice.partition_fragment_B(smem_k);  // (MMA, 1, MMA_K, stage)
  const auto queries_of = make_tensor(make_smem_ptr(static_cast<typename Config::Operand*>(nullptr)),
                                      Layout<Shape<_64, Int<Config::kHeadDim>>>{});
  auto queries0 = slice.partition_fragment_A(queries_of);  // (MMA, 1, MMA_K)
  auto queries1 = slice.partition_fragment_A(queries_of);  // of the second operand, if there is one
  auto scores0 = partition_fragment_C(mma, Shape<_64, Int<kTileKeys>>{});

  constexpr bool kTwoOperands = Config::kOperands == 2;
  const VoterLane voter{who.thread % 32};
  const int warp = uniform(who.thread / 32);
  const Visibility sees{tile.sequence.seqlen_q, tile.sequence.seqlen_k, params.select.causal};

  // What is left of a slot once its queries are loaded.
  struct Voters {
    VotingRow<kRule> row;
    uint64_t* words;
    uint32_t skips;  // the lane's votes to skip its block of the last 32 key tiles, the last in bit 0
    int full, visible;
    int ends[kQuadRows];  // of the keys that the thread's rows see
    bool exists;
  };
  const auto load = [&](int operand, auto& queries, Voters& voters) BSFA_INLINE_LAMBDA {
    const Slot slot =
        find_slot(params.select, tile, (who.warpgroup * Config::kOperands + operand) * 4 + warp);
    load_voters<Config, kRule>(params.select, params.rounded, tile, slot, voter, queries, voters.row);
    voters.words = words_of_block(params.select, params.select.block_mask, params.select.mask_words,
                                  tile.sequence, tile.head, slot.block);
    voters.skips = ~0u;
    voters.exists = uniform(slot.exists);
    voters.full = uniform(slot.keys.full);
    voters.visible = uniform(slot.keys.visible);
    CUTE_UNROLL
    for (int row = 0; row < kQuadRows; ++row) {
      voters.ends[row] = sees.keys(slot.query(voter.row(row)));
    }
  };
  Voters voters0, voters1;
  load(0, queries0, voters0);
  if constexpr (kTwoOperands) {
    load(1, queries1, voters1);
  }

  // Takes the lane's votes on its key block of a tile. `masked`: there may be hidden scores, forced blocks
  // and invisible ones.
  const auto vote = [&](Value peak0, Value peak1, float key_scale, int key_tile,
                        auto masked) BSFA_INLINE_LAMBDA {
    constexpr bool kMasked = decltype(masked)::value;
    const auto is_hidden = [&](Value peak) { return kMasked && peak == hidden_peak<Value>(); };
    Vote vote0 = voters0.row.vote(peak0, key_scale, is_hidden(peak0), voter);
    [[maybe_unused]] Vote vote1{};
    if constexpr (kTwoOperands) {
      vote1 = voters1.row.vote(peak1, key_scale, is_hidden(peak1), voter);
    }
    if constexpr (kRule == Rule::kPeakLse) {
      if (__any_sync(0xffffffff, vote0.is_high || vote1.is_high)) {
        voters0.row.rebase(vote0, voter);
        if constexpr (kTwoOperands) {
          voters1.row.rebase(vote1, voter);
        }
      }
    }
    const auto take = [&](Voters& voters, const Vote& vote) {
      float excess = vote.excess;
      if constexpr (kMasked) {
        const int block = kTileBlocks * key_tile + voter.key_block();
        if (block >= voters.full) {
          excess = voters.exists && block < voters.visible ? 0.0f : -1.0f;
        }
      }
      voters.skips = __funnelshift_l(__float_as_uint(excess), voters.skips, 1);  // the sign
    };
    take(voters0, vote0);
    if constexpr (kTwoOperands) {
      take(voters1, vote1);
    }
    if (key_tile % 32 == 0) {
      add_votes(voters0.words, key_tile / 32, ~voters0.skips, voter);
      voters0.skips = ~0u;
      if constexpr (kTwoOperands) {
        add_votes(voters1.words, key_tile / 32, ~voters1.skips, voter);
        voters1.skips = ~0u;
      }
    }
  };
  const auto find_peaks = [&](const auto& scores, const Voters& voters, int key_tile, auto masked,
                              Value(&peaks)[kQuadRows][kTileBlocks]) BSFA_INLINE_LAMBDA {
    if constexpr (decltype(masked)::value) {
      if (kTileBlocks * (key_tile + 1) > voters.full) {
        const int ends[kQuadRows] = {voters.ends[0] - key_tile * kTileKeys,
                                     voters.ends[1] - key_tile * kTileKeys};
        thread_visible_peaks(scores, ends, voter, peaks);
        return;
      }
    }
    thread_peaks(scores, peaks);
  };

  // The peaks of the tile before, on which the vote is still to come: it is a long chain of dependent
  // instructions, whose gaps the next reduction fills. Before the first tile there is an invisible one.
  struct Pending {
    Value peak0, peak1;
    float key_scale;
  };
  Pending pending{hidden_peak<Value>(), hidden_peak<Value>(), 1.0f};

  // The GEMM of the operand with the tile is in flight. The other consumer's runs while scores are reduced.
  const auto step_of_one = [&](int key_tile, auto masked, auto more) BSFA_INLINE_LAMBDA {
    constexpr bool kMore = decltype(more)::value;
    const int stage = keys.stage();
    const PipelineState<Config::kStages> next{keys.count + 1};
    Value peaks[kQuadRows][kTileBlocks];

    const float key_scale = Config::kRounded ? storage.key_scales[stage][voter.key_block()] : 1.0f;
    if constexpr (kMore) {
      wait(storage.k_full[next.stage()], next.phase());
    }
    vote(pending.peak0, pending.peak1, pending.key_scale, key_tile + 1, masked);
    finish_gemm<0>(scores0);
    release_branchless(storage.k_empty[stage], who);
    find_peaks(scores0, voters0, key_tile, masked, peaks);
    if constexpr (kMore) {
      start_gemm<false>(mma, queries0, tSrK(_, _, _, next.stage()), scores0);
    }
    pending.peak0 = quad_peak(peaks, voter);
    pending.key_scale = key_scale;
    keys.advance();
  };

  // The GEMM of operand 0 with the tile is in flight. While a GEMM runs, the scores before it are reduced.
  // One at a time: ptxas serialises two that are both in flight where a loop begins. `more`: a tile follows.
  const auto step_of_two = [&](int key_tile, auto masked, auto more) BSFA_INLINE_LAMBDA {
    constexpr bool kMore = decltype(more)::value;
    const int stage = keys.stage();
    const PipelineState<Config::kStages> next{keys.count + 1};
    Value peaks[kQuadRows][kTileBlocks];
    auto scores1 = partition_fragment_C(mma, Shape<_64, Int<kTileKeys>>{});

    finish_gemm<0>(scores0);
    start_gemm<false>(mma, queries1, tSrK(_, _, _, stage), scores1);
    const float key_scale = Config::kRounded ? storage.key_scales[stage][voter.key_block()] : 1.0f;
    if constexpr (kMore) {
      wait(storage.k_full[next.stage()], next.phase());
    }
    find_peaks(scores0, voters0, key_tile, masked, peaks);
    vote(pending.peak0, pending.peak1, pending.key_scale, key_tile + 1, masked);
    pending.peak0 = quad_peak(peaks, voter);
    pending.key_scale = key_scale;

    finish_gemm<0>(scores1);
    if constexpr (kMore) {
      start_gemm<false>(mma, queries0, tSrK(_, _, _, next.stage()), scores0);
    }
    release_branchless(storage.k_empty[stage], who);
    find_peaks(scores1, voters1, key_tile, masked, peaks);
    pending.peak1 = quad_peak(peaks, voter);
    keys.advance();
  };

  const auto step = [&](int key_tile, auto masked, auto more) BSFA_INLINE_LAMBDA {
    if constexpr (kTwoOperands) {
      step_of_two(key_tile, masked, more);
    } else {
      step_of_one(key_tile, masked, more);
    }
  };

  wait(storage.k_full[keys.stage()], keys.phase());
  start_gemm<false>(mma, queries0, tSrK(_, _, _, keys.stage()), scores0);
  int key_tile = work.key_tiles - 1;
#pragma unroll 1
  for (; key_tile > 0 && kTileBlocks * (key_tile + 2) > work.full; --key_tile) {
    step(key_tile, true_type{}, true_type{});
  }
#pragma unroll 1
  for (; key_tile > 0; --key_tile) {
    step(key_tile, false_type{}, true_type{});
  }
  step(0, true_type{}, false_type{});
  vote(pending.peak0, pending.peak1, pending.key_scale, 0, true_type{});
}

// A tile whose verdicts follow from its thresholds.
template <class Config>
__device__ __forceinline__ void fill_tile(const SelectParams& params, const SelectTile& tile,
                                          const SelectWork& work, const ConsumerThread& who) {
  for (int operand = 0; operand < Config::kOperands; ++operand) {
    const int slot = (who.warpgroup * Config::kOperands + operand) * 4 + who.thread / 32;
    fill_slot(params, tile, find_slot(params, tile, slot), work, who.thread % 32);
  }
}

template <class Config, Rule kRule>
__device__ __forceinline__ void consume_key_tiles(const SelectKernelParams& params,
                                                  typename Config::SharedStorage& storage,
                                                  const ConsumerThread& who) {
  PipelineState<Config::kStages> keys;
  for_each_index(params.tiles, [&](int index) BSFA_INLINE_LAMBDA {
    const SelectTile tile = find_select_tile(params.select, params.schedule, index, Config::kSlots);
    if (!tile.exists) {
      return;
    }
    const SelectWork work = find_select_work(params.select, tile, Config::kSlots, who.thread % 32);
    if (work.votes) {
      vote_on_tile<Config, kRule>(params, storage, keys, tile, work, who);
    } else {
      fill_tile<Config>(params.select, tile, work, who);
    }
  });
}

template <class Config, Rule kRule>
__global__ void __launch_bounds__(Config::kThreads, 1)
    select_kernel(const __grid_constant__ SelectKernelParams params) {
  using Storage = typename Config::SharedStorage;
  const auto initialize = [&](Storage& storage) {
    cute::prefetch_tma_descriptor(&params.k);
    initialize_stages(storage.k_full, storage.k_empty, Config::kConsumerWarps);
  };
  const auto produce = [&](Storage& storage, int warp) BSFA_INLINE_LAMBDA {
    if (warp == 0) {
      load_key_tiles<Config>(params, storage, threadIdx.x);
    }
  };
  run_roles<Config>(initialize, produce, [&](Storage& storage, const ConsumerThread& who) BSFA_INLINE_LAMBDA {
    consume_key_tiles<Config, kRule>(params, storage, who);
  });
}

template <class Config>
SelectKernelParams make_select_kernel_params(const SelectParams& params) {
  using Element = typename Config::Element;
  SelectKernelParams kernel_params{};
  kernel_params.select = params;
  kernel_params.schedule =
      make_select_schedule(params, Config::kSlots, Config::kHeadDim * sizeof(typename Config::Operand));
  kernel_params.tiles = static_cast<int>(kernel_params.schedule.ctas());
  if constexpr (Config::kRounded) {
    kernel_params.rounded = {make_select_workspace(params, Config::kHeadDim), params.workspace};
    const int64_t head_elements = int64_t{params.seqlen_k} * Config::kHeadDim;
    const int64_t batch = params.packs_keys() ? 1 : params.batch;
    kernel_params.k = make_tensor_map("rounded k", CU_TENSOR_MAP_DATA_TYPE_UINT8, kernel_params.rounded.keys,
                                      {batch, params.seqlen_k, params.kv_heads, Config::kHeadDim},
                                      {params.kv_heads * head_elements, Config::kHeadDim, head_elements},
                                      Config::kTileKeys, Config::kBoxColumns);
  } else {
    constexpr auto kType = std::is_same_v<Element, cutlass::half_t> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                    : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    kernel_params.k =
        make_key_map(params, "k", kType, params.k, params.k_strides, Config::kTileKeys, Config::kBoxColumns);
  }
  return kernel_params;
}

template <class Config>
void select_with(const SelectParams& params, cudaStream_t stream) {
  const SelectKernelParams kernel_params = make_select_kernel_params<Config>(params);
  if constexpr (Config::kRounded) {
    round_keys<90, typename Config::Element, Config::kHeadDim>(params, kernel_params.rounded, stream);
  }
  const auto kernel_of = [&] {
    switch (params.rule) {
      case Rule::kAbsolute: return select_kernel<Config, Rule::kAbsolute>;
      case Rule::kRunningMax: return select_kernel<Config, Rule::kRunningMax>;
      default: return select_kernel<Config, Rule::kPeakLse>;
    }
  };
  launch_persistent<Config>(kernel_of(), kernel_params.tiles, kernel_params, stream);
}

template <class Element, int kHeadDim>
void select_blocks(const SelectParams& params, cudaStream_t stream) {
  if (!clear_block_mask(params, stream)) {
    return;
  }
  if (params.precision == Precision::kInt8) {
    select_with<SelectConfig<Element, int8_t, kHeadDim>>(params, stream);
  } else {
    select_with<SelectConfig<Element, Element, kHeadDim>>(params, stream);
  }
}

}  // namespace bsfa::sm90
