// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// A consumer warpgroup's pass over the key blocks of a tile without thresholds, two blocks at a time.
#pragma once

#include "consumer.cuh"

namespace bsfa::sm90 {

template <class Config, class Output>
__device__ __forceinline__ void attend_dense(const TileContext<Config>& context, Output& output,
                                             Softmax& softmax) {
  using namespace cute;
  using Element = typename Config::Element;
  auto& storage = context.storage;
  auto& rings = context.rings;
  const Tile& tile = context.tile;
  const ConsumerThread who = context.who;
  const float scale_log2 = context.params.scale * CUDART_L2E_F;

  // Operands.
  typename Config::PairScoresMma scores_mma;
  typename Config::ValuesMma values_mma;
  const auto scores_slice = scores_mma.get_slice(who.thread);
  const auto values_slice = values_mma.get_slice(who.thread);
  const auto smem_q = make_tensor(make_smem_ptr(storage.q), typename Config::SmemQ{});
  const auto smem_k = make_tensor(make_smem_ptr(storage.k), typename Config::SmemKPair{});
  const auto smem_v = make_tensor(make_smem_ptr(storage.v), typename Config::SmemV{});
  const auto tSrQ = scores_slice.partition_fragment_A(smem_q(_, _, who.warpgroup));  // (MMA, 1, MMA_K)
  const auto tSrK = scores_slice.partition_fragment_B(smem_k);                       // (MMA, 1, MMA_K, pair)
  const auto tOrV = values_slice.partition_fragment_B(smem_v);                       // (MMA, 1, MMA_K, stage)
  auto scores = partition_fragment_C(scores_mma, Shape<_64, _128>{});
  // Of the pair's first (upper) and second block.
  const auto half_layout =
      values_slice.partition_fragment_A(make_tensor<Element>(Shape<_64, _64>{})).layout();
  auto probabilities0 = make_tensor<Element>(half_layout);
  auto probabilities1 = make_tensor<Element>(half_layout);
  auto scores0 = make_tensor(scores.data(), Layout<Shape<_32>>{});
  auto scores1 = make_tensor(scores.data() + 32, Layout<Shape<_32>>{});

  int visible[kThreadRows];
  context.visible_keys(visible);

  // Steps.
  const auto await_keys = [&]() BSFA_INLINE_LAMBDA {
    wait(storage.k_full[rings.keys.stage], rings.keys.phase);
    wait(storage.k_full[rings.keys.stage + 1], rings.keys.phase);
  };
  const auto start_scores = [&]() BSFA_INLINE_LAMBDA {
    start_product<false>(scores_mma, tSrQ, tSrK(_, _, _, rings.keys.stage / 2), scores);
  };
  const auto release_keys = [&]() BSFA_INLINE_LAMBDA {
    for (int i = 0; i < 2; ++i) {
      context.release(storage.k_empty[rings.keys.stage]);
      rings.keys.advance();
    }
  };
  // Both blocks of V make one product: the ring may wrap between them.
  const auto start_values = [&]() BSFA_INLINE_LAMBDA {
    auto place = rings.values;
    wait(storage.v_full[place.stage], place.phase);
    start_product<true>(values_mma, probabilities0, tOrV(_, _, _, place.stage), output);
    place.advance();
    wait(storage.v_full[place.stage], place.phase);
    start_product<true>(values_mma, probabilities1, tOrV(_, _, _, place.stage), output);
  };
  const auto release_values = [&]() BSFA_INLINE_LAMBDA {
    for (int i = 0; i < 2; ++i) {
      context.release(storage.v_empty[rings.values.stage]);
      rings.values.advance();
    }
  };
  // P = exp(S - m); returns whether O must be multiplied by `factors`, as long as P V is under way.
  const auto exponentiate = [&](int key_block, bool masked, float (&factors)[kThreadRows])
                                BSFA_INLINE_LAMBDA {
                                  auto matrix = accumulator_matrix(scores);
                                  if (masked) {
                                    auto upper = accumulator_matrix(scores0);
                                    auto lower = accumulator_matrix(scores1);
                                    mask_scores(upper, who, visible, key_block * kKeyBlock);
                                    mask_scores(lower, who, visible, (key_block - 1) * kKeyBlock);
                                  }
                                  float maxima[kThreadRows];
                                  row_maxima(matrix, maxima);
                                  const bool raised = softmax.raise(maxima, scale_log2, factors);
                                  softmax.exponentiate(matrix, scale_log2);
                                  return raised;
                                };
  const auto round_probabilities = [&]() BSFA_INLINE_LAMBDA {
    round_to(probabilities0, scores0);
    round_to(probabilities1, scores1);
  };
  // The consumers take turns, so that one multiplies while the other exponentiates.
  const auto step = [&](int key_block, auto masked) BSFA_INLINE_LAMBDA {
    float factors[kThreadRows];
    await_keys();
    sync(NamedBarrier::kTurn0, who.warpgroup, Config::kConsumers * 128);
    start_scores();
    start_values();
    arrive(NamedBarrier::kTurn0, 1 - who.warpgroup, Config::kConsumers * 128);
    finish_product<2>(scores);
    release_keys();
    const bool raised = exponentiate(key_block, masked, factors);
    finish_product<0>(output);
    release_values();
    if (raised) {
      scale_rows(output, factors);
    }
    round_probabilities();
  };

  wait(storage.q_full, rings.queries.phase);
  int key_block = tile.key_blocks - 1;
  await_keys();
  start_scores();
  finish_product<0>(scores);
  release_keys();
  float factors[kThreadRows];
  exponentiate(key_block, true, factors);
  round_probabilities();
  auto place = rings.values;
  for (int i = 0; i < 2; ++i) {
    wait(storage.v_full[place.stage], place.phase);
    context.clear_foreign_values(place.stage, key_block - i);
    place.advance();
  }
  key_block -= 2;
  for (; key_block >= tile.full; key_block -= 2) {
    step(key_block, true_type{});
  }
  for (; key_block >= 0; key_block -= 2) {
    step(key_block, false_type{});
  }
  context.release(storage.q_empty);
  rings.queries.advance();
  start_values();
  finish_product<0>(output);
  release_values();
}

}  // namespace bsfa::sm90
