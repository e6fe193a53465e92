// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The passes over tiles without thresholds where there are registers for the scores of one key block only,
// and for a part of Q.
#pragma once

#include "dense.cuh"

namespace bsfa::sm90 {

// As attend_dense(), a block at a time.
template <class Config>
__device__ __forceinline__ int attend_dense_singly(typename Config::SharedStorage& storage,
                                                   ConsumerPipelines<Config>& pipelines,
                                                   const ForwardParams& params, const ConsumerThread& who,
                                                   int tiles) {
  using namespace cute;
  using Element = typename Config::Element;
  constexpr int kRegisterColumns = Config::kDenseRegisterColumns;
  const float scale_log2 = params.scale * CUDART_L2E_F;

  // Operands.
  typename Config::ScoresMma scores_mma;
  typename Config::SharedScoresMma shared_scores_mma;
  typename Config::ValuesMma values_mma;
  const auto values_slice = values_mma.get_slice(who.thread);
  const auto smem_q = queries_in_memory<Config, Config::kHeadDim>(storage, uniform(who.warpgroup));
  const auto smem_k = make_tensor(make_smem_ptr(storage.k), typename Config::SmemK{});
  const auto smem_v = make_tensor(make_smem_ptr(storage.v), typename Config::SmemV{});
  auto tSrQ = queries_fragment<Config, kRegisterColumns>(storage, scores_mma);            // (MMA, 1, MMA_K)
  const auto tSsQ = shared_scores_mma.get_slice(0).partition_fragment_A(smem_q);          // (MMA, 1, MMA_K)
  const auto tSrK = scores_mma.get_slice(who.thread).partition_fragment_B(smem_k);        // (.., stage)
  const auto tOrV = values_slice.partition_fragment_B(smem_v);                            // (.., stage)
  auto scores = partition_fragment_C(scores_mma, Shape<_64, _64>{});
  auto output = partition_fragment_C(values_mma, Shape<_64, Int<Config::kHeadDim>>{});
  auto probabilities = make_tensor<Element>(
      values_slice.partition_fragment_A(make_tensor<Element>(Shape<_64, _64>{})).layout());

  const typename Config::PublishedTile* published = &pipelines.published_tile(storage);
  Softmax softmax;
  int visible[kThreadRows];

  // Steps.
  bool keys_are_there = false;
  bool values_are_there = false;
  // Looks whether the next blocks of K and V have arrived.
  const auto look_ahead = [&]() BSFA_INLINE_LAMBDA {
    const PipelineState<Config::kKeyStages> key_state{pipelines.keys.count + 1};
    const PipelineState<Config::kValueStages> value_state{pipelines.values.count + 1};
    keys_are_there = uniform(storage.k_full[key_state.stage()].test_wait(key_state.phase()));
    values_are_there = uniform(storage.v_full[value_state.stage()].test_wait(value_state.phase()));
  };
  const auto await_keys = [&]() BSFA_INLINE_LAMBDA {
    wait_unless(keys_are_there, storage.k_full[pipelines.keys.stage()], pipelines.keys.phase());
  };
  const auto await_values = [&]() BSFA_INLINE_LAMBDA {
    wait_unless(values_are_there, storage.v_full[pipelines.values.stage()], pipelines.values.phase());
  };
  // The columns in registers and those in shared memory in turns: the latter need all the bandwidth.
  const auto start_scores = [&]() BSFA_INLINE_LAMBDA {
    constexpr int kRegisterSteps = kRegisterColumns / 16;
    const auto keys = tSrK(_, _, _, pipelines.keys.stage());
    warpgroup_fence_operand(tSrQ);
    warpgroup_fence_operand(scores);
    warpgroup_arrive();
    scores_mma.accumulate_ = GMMA::ScaleOut::Zero;
    shared_scores_mma.accumulate_ = GMMA::ScaleOut::One;
    CUTE_UNROLL
    for (int k = 0; k < Config::kHeadDim / 16; ++k) {
      if (k < kRegisterSteps) {
        gemm(scores_mma, tSrQ(_, _, k), keys(_, _, k), scores);
        scores_mma.accumulate_ = GMMA::ScaleOut::One;
      }
      if (k + kRegisterSteps < Config::kHeadDim / 16) {
        gemm(shared_scores_mma, tSsQ(_, _, k + kRegisterSteps), keys(_, _, k + kRegisterSteps), scores);
      }
    }
    warpgroup_commit_batch();
    warpgroup_fence_operand(scores);
  };
  // `key_block`: whose scores have been computed. With the last one the queries have been read.
  const auto release_keys = [&](int key_block) BSFA_INLINE_LAMBDA {
    release(storage.k_empty[pipelines.keys.stage()], who);
    pipelines.keys.advance();
    if (key_block == 0) {
      release(storage.q_empty, who);
    }
  };
  const auto start_values = [&]() BSFA_INLINE_LAMBDA {
    start_gemm<true>(values_mma, probabilities, tOrV(_, _, _, pipelines.values.stage()), output);
  };
  const auto release_values = [&]() BSFA_INLINE_LAMBDA {
    release(storage.v_empty[pipelines.values.stage()], who);
    pipelines.values.advance();
  };
  const auto mask = [&](int key_block) BSFA_INLINE_LAMBDA {
    auto matrix = accumulator_matrix(scores);
    const int first_key = Config::key_block(*published, key_block) * kKeyBlock;
    if (!sees_all(visible, first_key)) {
      mask_scores(matrix, who, visible, first_key);
    }
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
  // P = exp(S - m), in place.
  const auto exponentiate = [&]() BSFA_INLINE_LAMBDA {
    auto matrix = accumulator_matrix(scores);
    softmax.exponentiate(matrix, scale_log2);
  };
  // Ping-pong: one consumer's GEMMs overlap the other's exponentials. P V of the last block takes as long as
  // the exponentials of this one. The keys of the step are there when it begins.
  const auto step = [&](int key_block, auto masked) BSFA_INLINE_LAMBDA {
    pingpong_wait(who.warpgroup);
    start_scores();
    await_values();
    start_values();
    pingpong_signal(who.warpgroup);
    look_ahead();
    finish_gemm<1>(scores);
    release_keys(key_block);
    if constexpr (decltype(masked)::value) {
      mask(key_block);
    }
    float factors[kThreadRows];
    const bool raised = raise_maxima(factors);
    exponentiate();
    warpgroup_fence_operand(scores);
    // A branch, so that the compiler leaves the exponentials before the wait for P V.
    if (key_block >= 1) {
      await_keys();
    }
    finish_gemm<0>(output);
    release_values();
    round_to(probabilities, scores);
    if (raised) {
      scale_rows(output, factors);
    }
  };

  const auto next_queries = [&]() BSFA_INLINE_LAMBDA {
    load_queries<Config, kRegisterColumns>(storage, who, scores_mma, tSrQ);
    pipelines.queries.advance();
    await_keys();
  };

  // Once both consumers are here, the stages of V that one released unread in a sparse tile have been filled.
  if (params.q_block < Config::kTileQ) {
    sync(NamedBarrier::kTiles, 0, 2 * 128);
  }
  next_queries();
  start_scores();
#pragma unroll 1
  while (true) {
    const ConsumerBlock block = published->block_of(who.warpgroup);
    const TileContext<Config> context{storage, pipelines, params, *published, block, who};
    const int full = uniform(published->full);
    int key_block = uniform(published->key_blocks) - 1;
    softmax = Softmax{};
    clear(output);
    context.visible_keys(visible);
    keys_are_there = false;
    values_are_there = false;

    finish_gemm<0>(scores);
    release_keys(key_block);
    mask(key_block);
    // Nothing has been seen before: all maxima rise.
    float maxima[kThreadRows];
    float factors[kThreadRows];
    row_maxima(accumulator_matrix(scores), maxima);
    softmax.raise({true, true}, maxima, scale_log2, factors);
    exponentiate();
    round_to(probabilities, scores);
    await_values();
    context.clear_foreign_values(pipelines.values.stage(), Config::key_block(*published, key_block));
    --key_block;
    if (key_block >= 0) {
      await_keys();
    }
    for (; key_block >= full; --key_block) {
      step(key_block, true_type{});
    }
    for (; key_block >= 0; --key_block) {
      step(key_block, false_type{});
    }
    await_values();
    start_values();
    --tiles;
    const auto* next = &pipelines.published_tile(storage);
    bool goes_on = false;
    if (tiles > 0) {
      wait(storage.q_full, pipelines.queries.phase());
      goes_on = uniform(next->dense && next->key_blocks > 0);
    }
    const auto store = [&]() BSFA_INLINE_LAMBDA {
      release_values();
      store_results<Config>(context, output, softmax, Config::kept(*published, block));
    };
    if (!goes_on) {
      finish_gemm<0>(output);
      store();
      return tiles;
    }
    next_queries();
    finish_gemm<0>(output);
    start_scores();
    store();
    finish_gemm<0>(scores);
    published = next;
  }
}

// The pass that the configuration has registers for.
template <class Config>
__device__ __forceinline__ int attend_dense_tiles(typename Config::SharedStorage& storage,
                                                  ConsumerPipelines<Config>& pipelines,
                                                  const ForwardParams& params, const ConsumerThread& who,
                                                  int tiles) {
  if constexpr (Config::kStepBlocks == 1) {
    return attend_dense_singly<Config>(storage, pipelines, params, who, tiles);
  } else {
    return attend_dense<Config>(storage, pipelines, params, who, tiles);
  }
}

}  // namespace bsfa::sm90
