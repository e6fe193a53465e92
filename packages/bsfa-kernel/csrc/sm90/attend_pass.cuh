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
  // Consumers with the same list keep in step.
  const bool together = params.q_block == Config::kTileQ;

  // Operands.
  typename Config::ScoresMma scores_mma;
  typename Config::ValuesMma values_mma;
  const auto scores_slice = scores_mma.get_slice(who.thread);
  const auto values_slice = values_mma.get_slice(who.thread);
  const auto smem_k = make_tensor(make_smem_ptr(storage.blocks), typename Config::SmemK{});
  const auto smem_v = make_tensor(make_smem_ptr(storage.blocks), typename Config::SmemV{});
  auto tSrQ = queries_fragment<Config>(scores_mma);             // (MMA, 1, MMA_K)
  const auto tSrK = scores_slice.partition_fragment_B(smem_k);  // (MMA, 1, MMA_K, stage)
  const auto tOrV = values_slice.partition_fragment_B(smem_v);  // (MMA, 1, MMA_K, stage)
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
  const auto keys_of = [](uint32_t where) BSFA_INLINE_LAMBDA { return where & place::kStageBits; };
  const auto keys_phase_of = [](uint32_t where) BSFA_INLINE_LAMBDA { return where >> place::kPhase & 1; };
  const auto values_of = [](uint32_t where)
                             BSFA_INLINE_LAMBDA { return where >> place::kValueStage & place::kStageBits; };
  const auto values_phase_of = [](uint32_t where) BSFA_INLINE_LAMBDA {
    return where >> (place::kValueStage + place::kPhase) & 1;
  };
  const auto is_last = [](const Pair& pair) BSFA_INLINE_LAMBDA { return (pair.lower & place::kLast) != 0; };
  const auto is_full = [](const Pair& pair) BSFA_INLINE_LAMBDA { return (pair.lower & place::kEmpty) == 0; };
  const auto read_places = [&](uint32_t number) BSFA_INLINE_LAMBDA {
    return ptx::load_volatile(
        cute::cast_smem_ptr_to_uint(&storage.places[who.warpgroup][number % Config::kPairs * 2]));
  };
  // Whether all lanes have read what was written: some may have read before, some after.
  const auto are_written = [&](const uint4& places, uint32_t number) BSFA_INLINE_LAMBDA {
    const uint32_t awaited = number / Config::kPairs % 2 == 0 ? place::kRound : 0;
    return __all_sync(0xffffffff, (((places.y ^ awaited) | (places.w ^ awaited)) & place::kRound) == 0) != 0;
  };

  Pair current;  // its probabilities are there, or its scores first
  Pair next;
  bool next_is_known = false;
  bool keys_are_there = false;
  bool values_are_there = false;
  const auto await_next = [&]() BSFA_INLINE_LAMBDA {
    if (!next_is_known) {
      uint4 places = read_places(pipelines.pairs);
      while (!are_written(places, pipelines.pairs)) {
        places = read_places(pipelines.pairs);
      }
      next = {places.y, places.w};
    }
    wait_unless(keys_are_there, storage.full[keys_of(next.upper)], keys_phase_of(next.upper));
    wait_unless(keys_are_there, storage.full[keys_of(next.lower)], keys_phase_of(next.lower));
  };
  // Finds out about the next pair and its keys, without waiting.
  const auto look_for_next = [&]() BSFA_INLINE_LAMBDA {
    const uint4 places = read_places(pipelines.pairs);
    next = {places.y, places.w};
    next_is_known = are_written(places, pipelines.pairs);
    keys_are_there =
        uniform(next_is_known & storage.full[keys_of(next.upper)].test_wait(keys_phase_of(next.upper)) &
                storage.full[keys_of(next.lower)].test_wait(keys_phase_of(next.lower)));
  };
  const auto look_for_values = [&](const Pair& pair) BSFA_INLINE_LAMBDA {
    values_are_there = uniform(storage.full[values_of(pair.upper)].test_wait(values_phase_of(pair.upper)) &
                               storage.full[values_of(pair.lower)].test_wait(values_phase_of(pair.lower)));
  };
  const auto await_values = [&](const Pair& pair) BSFA_INLINE_LAMBDA {
    wait_unless(values_are_there, storage.full[values_of(pair.upper)], values_phase_of(pair.upper));
    wait_unless(values_are_there, storage.full[values_of(pair.lower)], values_phase_of(pair.lower));
  };

  // Steps.
  const auto start_scores = [&](const Pair& pair) BSFA_INLINE_LAMBDA {
    warpgroup_fence_operand(tSrQ);
    warpgroup_fence_operand(scores);
    warpgroup_arrive();
    multiply<false>(scores_mma, tSrQ, tSrK(_, _, _, keys_of(pair.upper)), scores0);
    multiply<false>(scores_mma, tSrQ, tSrK(_, _, _, keys_of(pair.lower)), scores1);
    warpgroup_commit_batch();
    warpgroup_fence_operand(scores);
  };
  const auto release_keys = [&](const Pair& pair) BSFA_INLINE_LAMBDA {
    release(storage.empty[keys_of(pair.upper)], who);
    if (is_full(pair)) {
      release(storage.empty[keys_of(pair.lower)], who);
    }
  };
  const auto start_values = [&](const Pair& pair) BSFA_INLINE_LAMBDA {
    warpgroup_fence_operand(probabilities0);
    warpgroup_fence_operand(probabilities1);
    warpgroup_fence_operand(output);
    warpgroup_arrive();
    multiply<true>(values_mma, probabilities0, tOrV(_, _, _, values_of(pair.upper)), output);
    multiply<true>(values_mma, probabilities1, tOrV(_, _, _, values_of(pair.lower)), output);
    warpgroup_commit_batch();
    warpgroup_fence_operand(output);
  };
  const auto release_values = [&](const Pair& pair) BSFA_INLINE_LAMBDA {
    release(storage.empty[values_of(pair.upper)], who);
    if (is_full(pair)) {
      release(storage.empty[values_of(pair.lower)], who);
    }
  };
  // Hides what must be hidden of the pair before the next one.
  const auto mask = [&](const ListTile& tile, const Pair& pair) BSFA_INLINE_LAMBDA {
    if (((pair.upper | pair.lower) & place::kMasked) == 0) {
      return;
    }
    const uint4 places = read_places(pipelines.pairs - 1);
    int visible[kThreadRows];
    visible_keys(params, tile.sequence, who, tile.first_query + who.warpgroup * Config::kWarpgroupQ, visible);
    auto upper = accumulator_matrix(scores0);
    auto lower = accumulator_matrix(scores1);
    mask_scores(upper, who, visible, static_cast<int>(places.x) * kKeyBlock);
    mask_scores(lower, who, visible, static_cast<int>(places.z) * kKeyBlock);
  };
  // Returns whether the output must be multiplied by `factors`: where a score is far above the maximum.
  const auto raise_maxima = [&](float (&factors)[kThreadRows]) BSFA_INLINE_LAMBDA {
    const RowFlags rows = softmax.exceeded_by_scores(accumulator_matrix(scores), scale_log2);
    bool raised = false;
    if (rows.any()) {
      float maxima[kThreadRows];
      row_maxima(accumulator_matrix(scores), maxima);
      raised = softmax.raise(rows, maxima, scale_log2, factors);
    }
    return raised;
  };
  // P = exp(S - m) of half the pair, in place.
  const auto exponentiate = [&](auto& half) BSFA_INLINE_LAMBDA {
    auto matrix = accumulator_matrix(half);
    softmax.exponentiate(matrix, scale_log2);
  };
  // As in the pass over dense tiles: P V of the last pair is done before half of this pair is exponentiated;
  // from then on rounding hides between the exponentials. The keys of the step are there when it begins.
  const auto step = [&](const ListTile& tile) BSFA_INLINE_LAMBDA {
    if (together) {
      pingpong_wait(who.warpgroup);
    }
    const Pair pair = next;
    start_scores(pair);
    await_values(current);
    start_values(current);
    if (together) {
      pingpong_signal(who.warpgroup);
    }
    ++pipelines.pairs;
    look_for_values(pair);
    finish_gemm<1>(scores);
    mask(tile, pair);
    release_keys(pair);
    float factors[kThreadRows];
    const bool raised = raise_maxima(factors);
    exponentiate(scores0);
    warpgroup_fence_operand(scores0);
    // A branch, so that the compiler leaves the exponentials before the wait for P V.
    if (!is_last(pair)) {
      look_for_next();
    }
    finish_gemm<0>(output);
    release_values(current);
    round_to(probabilities0, scores0);
    exponentiate(scores1);
    round_to(probabilities1, scores1);
    if (raised) {
      scale_rows(output, factors);
    }
    current = pair;
    // Not before the values were released: if both consumers held two pairs of values while they waited, all
    // stages could be taken.
    if (!is_last(pair)) {
      await_next();
    }
  };

  const auto next_tile = [&]() BSFA_INLINE_LAMBDA {
    load_queries<Config>(storage, who, scores_mma, tSrQ);
    ++pipelines.tiles;
    next_is_known = false;
    keys_are_there = false;
    await_next();
  };

  int slot = pipelines.slot();
  next_tile();
  start_scores(next);
#pragma unroll 1
  while (true) {
    const ListTile& tile = storage.tiles[slot];
    softmax = Softmax{};
    clear(output);
    current = next;
    ++pipelines.pairs;

    finish_gemm<0>(scores);
    mask(tile, current);
    release_keys(current);
    float factors[kThreadRows];
    raise_maxima(factors);
    exponentiate(scores0);
    round_to(probabilities0, scores0);
    exponentiate(scores1);
    round_to(probabilities1, scores1);
    // The one block that can reach beyond the keys is the first.
    values_are_there = false;
    await_values(current);
    if (params.is_packed()) {
      clear_foreign_values<Config>(params, tile.sequence, who,
                                   storage.blocks + values_of(current.upper) * Config::kBlockElements,
                                   static_cast<int>(read_places(pipelines.pairs - 1).x));
    }
    values_are_there = true;
    if (!is_last(current)) {
      next_is_known = false;
      keys_are_there = false;
      await_next();
    }
#pragma unroll 1
    while (!is_last(current)) {
      step(tile);
    }
    await_values(current);
    start_values(current);
    const int stored = slot;
    slot = pipelines.slot();
    wait(storage.q_full, pipelines.queries_phase());
    const auto store = [&]() BSFA_INLINE_LAMBDA {
      release_values(current);
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
    start_scores(next);
    store();
    finish_gemm<0>(scores);
  }
}

}  // namespace bsfa::sm90
