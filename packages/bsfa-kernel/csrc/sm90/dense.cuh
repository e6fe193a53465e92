// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// A consumer warpgroup's passes over the key blocks of tiles without thresholds, two blocks at a time: all
// that are visible, or those of a list that both consumers have.
#pragma once

#include "consumer.cuh"
#include "epilogue.cuh"

namespace bsfa::sm90 {

// Works on the next tile, which has keys and nothing to vote on, and on those after it as long as they are of
// that kind: the first scores of a tile are computed while the results of the one before it are stored.
// Of `tiles` tiles left before, returns how many are left after. attend(context) works on `published`, the
// tile: it begins with the first scores started, which it must wait for, and ends with the last P V started.
template <class Config, class Scores, class Output, class NextQueries, class StartScores, class Attend,
          class ReleaseValues>
__device__ __forceinline__ int for_each_dense_tile(
    typename Config::SharedStorage& storage, ConsumerPipelines<Config>& pipelines,
    const ForwardParams& params, const ConsumerThread& who, int tiles,
    const typename Config::PublishedTile*& published, Scores& scores, Output& output, Softmax& softmax,
    const NextQueries& next_queries, const StartScores& start_scores, const Attend& attend,
    const ReleaseValues& release_values) {
  published = &pipelines.published_tile(storage);
  next_queries();
  start_scores();
#pragma unroll 1
  while (true) {
    const ConsumerBlock block = published->block_of(who.warpgroup);
    const TileContext<Config> context{storage, pipelines, params, *published, block, who};
    softmax = Softmax{};
    clear(output);
    attend(context);
    --tiles;
    const auto* next = &pipelines.published_tile(storage);
    bool goes_on = false;  // a branch of its own: behind && ptxas leaves uniform registers in the loop above
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

// for_each_dense_tile(), two key blocks at a time. Key blocks are numbered from the last to the first one
// visited; Config::key_block() says where one lies.
template <class Config>
__device__ __forceinline__ int attend_dense(typename Config::SharedStorage& storage,
                                            ConsumerPipelines<Config>& pipelines, const ForwardParams& params,
                                            const ConsumerThread& who, int tiles) {
  using namespace cute;
  using Element = typename Config::Element;
  static_assert(Config::kStepBlocks == 2 && Config::kDenseRegisterColumns == Config::kHeadDim);
  const float scale_log2 = params.scale * CUDART_L2E_F;

  // Operands.
  typename Config::PairScoresMma scores_mma;
  typename Config::ValuesMma values_mma;
  const auto scores_slice = scores_mma.get_slice(who.thread);
  const auto values_slice = values_mma.get_slice(who.thread);
  const auto smem_k = make_tensor(make_smem_ptr(storage.k), typename Config::SmemKPair{});
  const auto smem_v = make_tensor(make_smem_ptr(storage.v), typename Config::SmemV{});
  auto tSrQ = queries_fragment<Config, Config::kHeadDim>(storage, scores_mma);  // (MMA, 1, MMA_K)
  const auto tSrK = scores_slice.partition_fragment_B(smem_k);                  // (MMA, 1, MMA_K, pair)
  const auto tOrV = values_slice.partition_fragment_B(smem_v);                  // (MMA, 1, MMA_K, stage)
  auto scores = partition_fragment_C(scores_mma, Shape<_64, _128>{});
  auto output = partition_fragment_C(values_mma, Shape<_64, Int<Config::kHeadDim>>{});
  // Of the pair's first (upper) and second block.
  const auto half_layout =
      values_slice.partition_fragment_A(make_tensor<Element>(Shape<_64, _64>{})).layout();
  auto probabilities0 = make_tensor<Element>(half_layout);
  auto probabilities1 = make_tensor<Element>(half_layout);
  auto scores0 = make_tensor(scores.data(), Layout<Shape<_32>>{});
  auto scores1 = make_tensor(scores.data() + 32, Layout<Shape<_32>>{});

  const typename Config::PublishedTile* published;
  Softmax softmax;
  int visible[kThreadRows];

  // Steps.
  bool keys_are_there = false;
  bool values_are_there = false;
  // Looks whether the next pairs of K and V have arrived.
  const auto look_ahead = [&]() BSFA_INLINE_LAMBDA {
    const PipelineState<Config::kKeyStages> key_state{pipelines.keys.count + 2};
    const PipelineState<Config::kValueStages> value_state{pipelines.values.count + 2};
    const PipelineState<Config::kValueStages> other_state{pipelines.values.count + 3};
    keys_are_there = uniform(storage.k_full[key_state.stage()].test_wait(key_state.phase()) &
                             storage.k_full[key_state.stage() + 1].test_wait(key_state.phase()));
    values_are_there = uniform(storage.v_full[value_state.stage()].test_wait(value_state.phase()) &
                               storage.v_full[other_state.stage()].test_wait(other_state.phase()));
  };
  const auto await_keys = [&]() BSFA_INLINE_LAMBDA {
    wait_unless(keys_are_there, storage.k_full[pipelines.keys.stage()], pipelines.keys.phase());
    wait_unless(keys_are_there, storage.k_full[pipelines.keys.stage() + 1], pipelines.keys.phase());
  };
  const auto await_values = [&]() BSFA_INLINE_LAMBDA {
    const PipelineState<Config::kValueStages> other{pipelines.values.count + 1};
    wait_unless(values_are_there, storage.v_full[pipelines.values.stage()], pipelines.values.phase());
    wait_unless(values_are_there, storage.v_full[other.stage()], other.phase());
  };
  const auto start_scores = [&]() BSFA_INLINE_LAMBDA {
    start_gemm<false>(scores_mma, tSrQ, tSrK(_, _, _, pipelines.keys.stage() / 2), scores);
  };
  const auto release_keys = [&]() BSFA_INLINE_LAMBDA {
    for (int i = 0; i < 2; ++i) {
      release(storage.k_empty[pipelines.keys.stage()], who);
      pipelines.keys.advance();
    }
  };
  // In two halves: the pipeline may wrap between them.
  const auto start_values = [&]() BSFA_INLINE_LAMBDA {
    const PipelineState<Config::kValueStages> other{pipelines.values.count + 1};
    warpgroup_fence_operand(probabilities0);
    warpgroup_fence_operand(probabilities1);
    warpgroup_fence_operand(output);
    warpgroup_arrive();
    multiply<true>(values_mma, probabilities0, tOrV(_, _, _, pipelines.values.stage()), output);
    multiply<true>(values_mma, probabilities1, tOrV(_, _, _, other.stage()), output);
    warpgroup_commit_batch();
    warpgroup_fence_operand(output);
  };
  const auto release_values = [&]() BSFA_INLINE_LAMBDA {
    for (int i = 0; i < 2; ++i) {
      release(storage.v_empty[pipelines.values.stage()], who);
      pipelines.values.advance();
    }
  };
  const auto mask = [&](int key_block) BSFA_INLINE_LAMBDA {
    auto upper = accumulator_matrix(scores0);
    auto lower = accumulator_matrix(scores1);
    const int first_upper = Config::key_block(*published, key_block) * kKeyBlock;
    const int first_lower = Config::key_block(*published, key_block - 1) * kKeyBlock;
    if (!Config::kShortEnds || !sees_all(visible, first_upper)) {
      mask_scores(upper, who, visible, first_upper);
    }
    if (!Config::kShortEnds || !sees_all(visible, first_lower)) {
      mask_scores(lower, who, visible, first_lower);
    }
  };
  const auto raise_maxima = [&](float (&factors)[kThreadRows]) BSFA_INLINE_LAMBDA {
    return softmax.raise_where_exceeded(accumulator_matrix(scores), scale_log2, factors);
  };
  // P = exp(S - m) of half the pair, in place.
  const auto exponentiate = [&](auto& half) BSFA_INLINE_LAMBDA {
    auto matrix = accumulator_matrix(half);
    softmax.exponentiate(matrix, scale_log2);
  };
  // Ping-pong: one consumer's GEMMs overlap the other's exponentials. P V of the last pair is
  // done before half of this pair is exponentiated; from then on rounding hides between the exponentials. The
  // keys of the step are there when it begins.
  const auto step = [&](int key_block, auto masked) BSFA_INLINE_LAMBDA {
    pingpong_wait(who.warpgroup);
    start_scores();
    await_values();
    start_values();
    pingpong_signal(who.warpgroup);
    look_ahead();
    finish_gemm<1>(scores);
    release_keys();
    if constexpr (decltype(masked)::value) {
      mask(key_block);
    }
    float factors[kThreadRows];
    const bool raised = raise_maxima(factors);
    exponentiate(scores0);
    warpgroup_fence_operand(scores0);
    // A branch, so that the compiler leaves the exponentials before the wait for P V. At head_dim 64 it does.
    if (key_block >= 2) {
      await_keys();
    }
    finish_gemm<0>(output);
    release_values();
    round_to(probabilities0, scores0);
    exponentiate(scores1);
    round_to(probabilities1, scores1);
    if (raised) {
      scale_rows(output, factors);
    }
  };

  const auto next_queries = [&]() BSFA_INLINE_LAMBDA {
    load_queries<Config, Config::kHeadDim>(storage, who, scores_mma, tSrQ);
    pipelines.queries.advance();
    await_keys();
  };

  // Once both consumers are here, the stages of V that one released unread in a sparse tile have been filled.
  if (params.q_block < Config::kTileQ) {
    sync(NamedBarrier::kTiles, 0, 2 * 128);
  }
  ptx::pad<Config::kDensePadding>();
  const auto attend = [&](const TileContext<Config>& context) BSFA_INLINE_LAMBDA {
    const int full = uniform(published->full);
    int key_block = uniform(published->key_blocks) - 1;
    context.visible_keys(visible);
    keys_are_there = false;
    values_are_there = false;

    finish_gemm<0>(scores);
    release_keys();
    mask(key_block);
    float factors[kThreadRows];
    if constexpr (Config::kShortEnds) {
      // Nothing has been seen before: all maxima rise.
      float maxima[kThreadRows];
      row_maxima(accumulator_matrix(scores), maxima);
      softmax.raise({true, true}, maxima, scale_log2, factors);
    } else {
      raise_maxima(factors);
    }
    exponentiate(scores0);
    round_to(probabilities0, scores0);
    exponentiate(scores1);
    round_to(probabilities1, scores1);
    await_values();
    for (int i = 0; i < 2; ++i) {
      const PipelineState<Config::kValueStages> state{pipelines.values.count + i};
      context.clear_foreign_values(state.stage(), Config::key_block(*published, key_block - i));
    }
    key_block -= 2;
    if (key_block >= 0) {
      await_keys();
    }
    for (; key_block >= full; key_block -= 2) {
      step(key_block, true_type{});
    }
    for (; key_block >= 0; key_block -= 2) {
      step(key_block, false_type{});
    }
    await_values();
    start_values();
  };
  return for_each_dense_tile<Config>(storage, pipelines, params, who, tiles, published, scores, output,
                                     softmax, next_queries, start_scores, attend, release_values);
}

}  // namespace bsfa::sm90
