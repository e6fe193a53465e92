// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// A consumer warpgroup's pass over lists of key blocks, two blocks at a time.
#pragma once

#include "attend_config.cuh"
#include "consumer.cuh"
#include "epilogue.cuh"

namespace bsfa::sm90 {

// What a consumer takes along from tile to tile.
template <class Config>
struct ListPipelines {
  uint32_t tiles = 0;  // passed
  uint32_t pairs = 0;  // of places, passed

  __device__ __forceinline__ int slot() const { return tiles % Config::kTileSlots; }
  __device__ __forceinline__ uint32_t queries_phase() const { return tiles % 2; }
};

// What the epilogue works on.
template <class Config>
struct ListContext {
  typename Config::SharedStorage& storage;
  const AttendParams& params;
  const ListTile& tile;
  const ConsumerBlock& block;
  const ConsumerThread who;

  __device__ __forceinline__ int first_query() const {
    return tile.first_query + who.warpgroup * Config::kWarpgroupQ;
  }
};

// Writes the results of the tile in a slot, and gives the slot back.
template <class Config, class Output>
__device__ __forceinline__ void store_list(typename Config::SharedStorage& storage,
                                           const AttendParams& params, const ConsumerThread& who, int slot,
                                           Output& output, const Softmax& softmax) {
  const ListTile& tile = storage.tiles[slot];
  const ConsumerBlock block = tile.blocks[who.warpgroup];
  const ListContext<Config> context{storage, params, tile, block, who};
  store_results<Config>(context, output, softmax, max(tile.lengths[who.warpgroup], 0));
  __syncwarp();
  release(storage.tile_empty[slot], who);
}

// Takes the next tile, which has key blocks for this consumer, and those after it for as long as they have:
// the first scores of a tile are computed while the results of the one before it are stored.
template <class Config>
__device__ __forceinline__ void attend_lists(typename Config::SharedStorage& storage,
                                             ListPipelines<Config>& pipelines, const AttendParams& params,
                                             const ConsumerThread& who) {
  using namespace cute;
  using Element = typename Config::Element;
  const float scale_log2 = params.scale * CUDART_L2E_F;

  // Operands.
  typename Config::ScoresMma scores_mma;
  typename Config::ValuesMma values_mma;
  const auto scores_slice = scores_mma.get_slice(who.thread);
  const auto values_slice = values_mma.get_slice(who.thread);
  const auto smem_k = make_tensor(make_smem_ptr(storage.k), typename Config::SmemK{});
  const auto smem_v = make_tensor(make_smem_ptr(storage.v), typename Config::SmemV{});
  auto tSrQ = queries_fragment<Config, Config::kHeadDim>(storage, scores_mma);  // (MMA, 1, MMA_K)
  const auto tSrK = scores_slice.partition_fragment_B(smem_k);                  // (MMA, 1, MMA_K, stage)
  const auto tOrV = values_slice.partition_fragment_B(smem_v);                  // (MMA, 1, MMA_K, stage)
  // Of the pair's first (upper) and second block.
  const auto half_scores = partition_fragment_C(scores_mma, Shape<_64, _64>{}).layout();
  auto scores = make_tensor<float>(Layout<Shape<_64>>{});
  auto scores0 = make_tensor(scores.data(), half_scores);
  auto scores1 = make_tensor(scores.data() + 32, half_scores);
  auto output = partition_fragment_C(values_mma, Shape<_64, Int<Config::kHeadDim>>{});
  const auto half_layout =
      values_slice.partition_fragment_A(make_tensor<Element>(Shape<_64, _64>{})).layout();
  auto probabilities0 = make_tensor<Element>(half_layout);
  auto probabilities1 = make_tensor<Element>(half_layout);

  Softmax softmax;

  // Places of the list.
  struct Pair {
    uint32_t upper, lower;  // where the blocks are
  };
  const auto stage_of = [](uint32_t where) BSFA_INLINE_LAMBDA { return where & place::kStageBits; };
  const auto phase_of = [](uint32_t where) BSFA_INLINE_LAMBDA { return where >> place::kPhase & 1; };
  const auto is_last = [](const Pair& pair) BSFA_INLINE_LAMBDA { return (pair.lower & place::kLast) != 0; };
  const auto read_places = [&](auto& ring, uint32_t number) BSFA_INLINE_LAMBDA {
    return ptx::load_volatile(
        cute::cast_smem_ptr_to_uint(&ring.places[who.warpgroup][number % Config::kPairs * 2]));
  };
  // Reads them. Returns whether all lanes have read what was written: some may have come before, some after.
  const auto find_pair = [&](auto& ring, uint32_t number, Pair& pair) BSFA_INLINE_LAMBDA {
    const uint4 places = read_places(ring, number);
    pair = {places.x, places.z};
    const uint32_t awaited = number / Config::kPairs % 2 == 0 ? place::kRound : 0;
    return __all_sync(0xffffffff, (((pair.upper ^ awaited) | (pair.lower ^ awaited)) & place::kRound) == 0) !=
           0;
  };
  // Finds out about a pair, without waiting. Returns whether its blocks are there.
  const auto look_for = [&](auto& ring, uint32_t number, Pair& pair) BSFA_INLINE_LAMBDA {
    const bool found = find_pair(ring, number, pair);
    return uniform(found & ring.full[stage_of(pair.upper)].test_wait(phase_of(pair.upper)) &
                   ring.full[stage_of(pair.lower)].test_wait(phase_of(pair.lower)));
  };
  const auto await_unless = [&](bool there, auto& ring, uint32_t number, Pair& pair) BSFA_INLINE_LAMBDA {
    if (!there) {
      while (!find_pair(ring, number, pair)) {
      }
      wait(ring.full[stage_of(pair.upper)], phase_of(pair.upper));
      wait(ring.full[stage_of(pair.lower)], phase_of(pair.lower));
    }
  };
  const auto release_pair = [&](auto& ring, const Pair& pair) BSFA_INLINE_LAMBDA {
    release(ring.empty[stage_of(pair.upper)], who);
    if ((pair.lower & place::kEmpty) == 0) {
      release(ring.empty[stage_of(pair.lower)], who);
    }
  };

  Pair pair{};    // whose scores are computed or have been; number pipelines.pairs - 1
  Pair next{};    // its keys are multiplied next
  Pair values{};  // of the pair whose probabilities are there

  // Steps. Stages of operands are in uniform registers, by `uniform`, before the GEMMs are issued.
  const auto start_scores = [&](int upper, int lower) BSFA_INLINE_LAMBDA {
    warpgroup_fence_operand(tSrQ);
    warpgroup_fence_operand(scores);
    warpgroup_arrive();
    multiply<false>(scores_mma, tSrQ, tSrK(_, _, _, upper), scores0);
    multiply<false>(scores_mma, tSrQ, tSrK(_, _, _, lower), scores1);
    warpgroup_commit_batch();
    warpgroup_fence_operand(scores);
    pair = next;
    ++pipelines.pairs;
  };
  const auto start_values = [&](int upper, int lower) BSFA_INLINE_LAMBDA {
    warpgroup_fence_operand(probabilities0);
    warpgroup_fence_operand(probabilities1);
    warpgroup_fence_operand(output);
    warpgroup_arrive();
    multiply<true>(values_mma, probabilities0, tOrV(_, _, _, upper), output);
    multiply<true>(values_mma, probabilities1, tOrV(_, _, _, lower), output);
    warpgroup_commit_batch();
    warpgroup_fence_operand(output);
  };
  const auto uniform_stage = [&](uint32_t where)
                                 BSFA_INLINE_LAMBDA { return uniform(static_cast<int>(stage_of(where))); };
  // Hides what must be hidden of the pair.
  const auto mask = [&](const ListTile& tile) BSFA_INLINE_LAMBDA {
    if (((pair.upper | pair.lower) & place::kMasked) == 0) {
      return;
    }
    const uint4 places = read_places(storage.keys, pipelines.pairs - 1);
    const Visibility sees{tile.sequence.seqlen_q, tile.sequence.seqlen_k, params.causal};
    int visible[kThreadRows];
    CUTE_UNROLL
    for (int row = 0; row < kThreadRows; ++row) {
      visible[row] = sees.keys(tile.first_query + who.warpgroup * Config::kWarpgroupQ + who.row(row));
    }
    auto upper = accumulator_matrix(scores0);
    auto lower = accumulator_matrix(scores1);
    mask_scores(upper, who, visible, static_cast<int>(places.y) * kKeyBlock);
    mask_scores(lower, who, visible, static_cast<int>(places.w) * kKeyBlock);
  };
  const auto raise_maxima = [&](float (&factors)[kThreadRows]) BSFA_INLINE_LAMBDA {
    return softmax.raise_where_exceeded(accumulator_matrix(scores), scale_log2, factors);
  };
  // P = exp(S - m) of half the pair, in place.
  const auto exponentiate = [&](auto& half) BSFA_INLINE_LAMBDA {
    auto matrix = accumulator_matrix(half);
    softmax.exponentiate(matrix, scale_log2);
  };
  // As in the pass over dense tiles: P V of the last pair is done before half of this pair is exponentiated;
  // from then on rounding hides between the exponentials. What is multiplied is there when a step begins.
  const auto step = [&](const ListTile& tile) BSFA_INLINE_LAMBDA {
    const int upper_keys = uniform_stage(next.upper);
    const int lower_keys = uniform_stage(next.lower);
    const int upper_values = uniform_stage(values.upper);
    const int lower_values = uniform_stage(values.lower);
    start_scores(upper_keys, lower_keys);
    start_values(upper_values, lower_values);
    Pair next_values;
    bool keys_are_there = look_for(storage.keys, pipelines.pairs, next);
    const bool values_are_there = look_for(storage.values, pipelines.pairs - 1, next_values);
    finish_gemm<1>(scores);
    mask(tile);
    release_pair(storage.keys, pair);
    float factors[kThreadRows];
    const bool raised = raise_maxima(factors);
    exponentiate(scores0);
    warpgroup_fence_operand(scores0);
    // A branch, so that the compiler leaves the exponentials before the wait for P V.
    if (!is_last(pair) & !keys_are_there) {
      keys_are_there = look_for(storage.keys, pipelines.pairs, next);
    }
    finish_gemm<0>(output);
    release_pair(storage.values, values);
    round_to(probabilities0, scores0);
    exponentiate(scores1);
    round_to(probabilities1, scores1);
    if (raised) {
      scale_rows(output, factors);
    }
    // Not before the values were released: if both consumers held two pairs of them while they waited, the
    // loaders could be out of stages.
    values = next_values;
    await_unless(values_are_there, storage.values, pipelines.pairs - 1, values);
    if (!is_last(pair)) {
      await_unless(keys_are_there, storage.keys, pipelines.pairs, next);
    }
  };

  const auto next_tile = [&]() BSFA_INLINE_LAMBDA {
    load_queries<Config, Config::kHeadDim>(storage, who, scores_mma, tSrQ);
    ++pipelines.tiles;
    await_unless(false, storage.keys, pipelines.pairs, next);
  };

  int slot = pipelines.slot();
  next_tile();
  start_scores(uniform_stage(next.upper), uniform_stage(next.lower));
#pragma unroll 1
  while (true) {
    const ListTile& tile = storage.tiles[slot];
    softmax = Softmax{};
    clear(output);

    finish_gemm<0>(scores);
    mask(tile);
    release_pair(storage.keys, pair);
    float factors[kThreadRows];
    raise_maxima(factors);
    exponentiate(scores0);
    round_to(probabilities0, scores0);
    exponentiate(scores1);
    round_to(probabilities1, scores1);
    await_unless(false, storage.values, pipelines.pairs - 1, values);
    if (params.has_foreign_keys()) {
      // The one block that can reach beyond the keys is the first.
      const int key_block = static_cast<int>(read_places(storage.values, pipelines.pairs - 1).y);
      clear_foreign_values<Config>(params, tile.sequence, who,
                                   storage.v + stage_of(values.upper) * Config::kBlockElements, key_block);
    }
    if (!is_last(pair)) {
      await_unless(false, storage.keys, pipelines.pairs, next);
    }
#pragma unroll 1
    while (!is_last(pair)) {
      step(tile);
    }
    start_values(uniform_stage(values.upper), uniform_stage(values.lower));
    const int stored = slot;
    slot = pipelines.slot();
    wait(storage.q_full, pipelines.queries_phase());
    const auto store = [&]() BSFA_INLINE_LAMBDA {
      release_pair(storage.values, values);
      store_list<Config>(storage, params, who, stored, output, softmax);
    };
    const bool goes_on =
        uniform(!storage.tiles[slot].is_end && storage.tiles[slot].lengths[who.warpgroup] > 0);
    if (!goes_on) {
      finish_gemm<0>(output);
      store();
      return;
    }
    next_tile();
    finish_gemm<0>(output);
    start_scores(uniform_stage(next.upper), uniform_stage(next.lower));
    store();
    finish_gemm<0>(scores);
  }
}

}  // namespace bsfa::sm90
