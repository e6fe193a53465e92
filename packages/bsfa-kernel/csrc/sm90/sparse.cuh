// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// A consumer warpgroup's pass over the key blocks of a tile with thresholds: vote, and multiply V only for
// kept blocks. docs/kernel-sm90.md says what overlaps what.
#pragma once

#include "consumer.cuh"

namespace bsfa::sm90 {

// Returns the number of blocks kept.
template <class Config, class Output>
__device__ __forceinline__ int attend_sparse(const TileContext<Config>& context, Output& output,
                                             Softmax& softmax) {
  using namespace cute;
  using Element = typename Config::Element;
  auto& storage = context.storage;
  auto& rings = context.rings;
  const ForwardParams& params = context.params;
  const Tile& tile = context.tile;
  const QueryBlock& block = context.block;
  const ConsumerThread who = context.who;
  const bool halved = params.q_block < Config::kTileQ;
  const float scale_log2 = params.scale * CUDART_L2E_F;

  // Operands.
  typename Config::ScoresMma scores_mma;
  typename Config::ValuesMma values_mma;
  const auto scores_slice = scores_mma.get_slice(who.thread);
  const auto values_slice = values_mma.get_slice(who.thread);
  const auto smem_q = make_tensor(make_smem_ptr(storage.q), typename Config::SmemQ{});
  const auto smem_k = make_tensor(make_smem_ptr(storage.k), typename Config::SmemK{});
  const auto smem_v = make_tensor(make_smem_ptr(storage.v), typename Config::SmemV{});
  const auto smem_q_half = smem_q(_, _, who.warpgroup);
  auto tSrQ = scores_slice.partition_fragment_A(smem_q_half);   // (MMA, 1, MMA_K)
  const auto tSrK = scores_slice.partition_fragment_B(smem_k);  // (MMA, 1, MMA_K, stage)
  const auto tOrV = values_slice.partition_fragment_B(smem_v);  // (MMA, 1, MMA_K, stage)
  auto scores0 = partition_fragment_C(scores_mma, Shape<_64, _64>{});
  auto scores1 = partition_fragment_C(scores_mma, Shape<_64, _64>{});
  auto probabilities = make_tensor<Element>(
      values_slice.partition_fragment_A(make_tensor<Element>(Shape<_64, _64>{})).layout());

  wait(storage.q_full, rings.queries.phase);
  {
    const auto copy_q = make_tiled_copy_A(Copy_Atom<SM75_U32x4_LDSM_N, Element>{}, scores_mma);
    const auto copy_slice = copy_q.get_thread_slice(who.thread);
    auto to = copy_slice.retile_D(tSrQ);
    copy(copy_q, copy_slice.partition_S(smem_q_half), to);
  }
  context.release(storage.q_empty);
  rings.queries.advance();

  // What the scaled scores of a row must reach; NaN where a row must not or cannot vote.
  const float threshold = block.threshold == CUDART_INF_F ? CUDART_NAN_F : block.threshold;
  float bounds[kThreadRows];
  float maxima[kThreadRows];  // of the block voted on last, over the thread's columns
  CUTE_UNROLL
  for (int row = 0; row < kThreadRows; ++row) {
    const bool votes = context.first_query() + who.row(row) < tile.sequence.seqlen_q;
    bounds[row] = votes ? threshold + (params.rule == Rule::kAbsolute ? 0.0f : -CUDART_INF_F) : CUDART_NAN_F;
  }
  int kept = 0;
  Verdict verdict{};

  // Steps.
  const auto start_scores = [&](auto& scores) BSFA_INLINE_LAMBDA {
    wait(storage.k_full[rings.keys.stage], rings.keys.phase);
    start_product<false>(scores_mma, tSrQ, tSrK(_, _, _, rings.keys.stage), scores);
  };
  const auto release_keys = [&]() BSFA_INLINE_LAMBDA {
    context.release(storage.k_empty[rings.keys.stage]);
    rings.keys.advance();
  };
  const auto start_values = [&]() BSFA_INLINE_LAMBDA {
    wait(storage.v_full[rings.values.stage], rings.values.phase);
    start_product<true>(values_mma, probabilities, tOrV(_, _, _, rings.values.stage), output);
  };
  const auto release_values = [&]() BSFA_INLINE_LAMBDA {
    context.release(storage.v_empty[rings.values.stage]);
    rings.values.advance();
  };
  const auto passes = [&](const auto& scores) BSFA_INLINE_LAMBDA {
    row_maxima(accumulator_matrix(scores), maxima);
    bool keeps = false;
    CUTE_UNROLL
    for (int row = 0; row < kThreadRows; ++row) {
      keeps |= params.scale * maxima[row] >= bounds[row];
    }
    return keeps;
  };
  const auto hear_verdict = [&]() BSFA_INLINE_LAMBDA {
    const uint64_t votes = await_verdicts<Config>(storage, rings.verdicts);
    const uint32_t own =
        who.warpgroup == 0 ? static_cast<uint32_t>(votes) : static_cast<uint32_t>(votes >> 32);
    verdict = {halved ? own != 0 : votes != 0, votes != 0};
    kept += verdict.keep;
    rings.verdicts.advance();
  };
  const auto vote = [&](const auto& scores) BSFA_INLINE_LAMBDA {
    publish<Config>(storage, rings.verdicts, who.warp(), passes(scores));
    hear_verdict();
  };
  // P = exp(S - m), O *= exp(m_old - m), and the bounds that follow.
  const auto absorb = [&](auto& scores) BSFA_INLINE_LAMBDA {
    float factors[kThreadRows];
    if (softmax.raise(maxima, scale_log2, factors)) {
      scale_rows(output, factors);
    }
    auto matrix = accumulator_matrix(scores);
    softmax.exponentiate(matrix, scale_log2);
    round_to(probabilities, scores);
    if (params.rule != Rule::kAbsolute) {
      CUTE_UNROLL
      for (int row = 0; row < kThreadRows; ++row) {
        const float sum = params.rule == Rule::kRunningLse ? quad_sum(softmax.sum[row]) : 0.0f;
        const float reference = row_reference(params.rule, params.scale, softmax.maximum[row], sum);
        bounds[row] = isnan(bounds[row]) ? CUDART_NAN_F : threshold + reference;
      }
    }
  };
  // A block that only the other warpgroup keeps takes a stage of V all the same.
  const auto pass_values_by = [&]() BSFA_INLINE_LAMBDA {
    if (verdict.load) {
      release_values();
    }
  };

  // The blocks with masked scores, one by one; and the rest too where there is nothing to overlap.
  const int overlapped = tile.full >= 2 ? tile.full : 0;
  int visible[kThreadRows];
  context.visible_keys(visible);
  for (int key_block = tile.key_blocks - 1; key_block >= overlapped; --key_block) {
    const bool participates = key_block < block.keys.visible;
    const bool forced = participates && key_block >= block.undecided;
    start_scores(scores0);
    finish_product<0>(scores0);
    release_keys();
    auto matrix = accumulator_matrix(scores0);
    mask_scores(matrix, who, visible, key_block * kKeyBlock);
    const bool passed = passes(scores0);
    publish<Config>(storage, rings.verdicts, who.warp(), forced || (participates && passed));
    hear_verdict();
    if (verdict.keep) {
      absorb(scores0);
      wait(storage.v_full[rings.values.stage], rings.values.phase);
      context.clear_foreign_values(rings.values.stage, key_block);
      start_values();
      finish_product<0>(output);
      release_values();
    } else {
      pass_values_by();
    }
  }
  if (overlapped == 0) {
    return kept;
  }

  // From here on the verdict on a block is heard while the scores of the next one are computed. At the start
  // of a step `current` has the scores of a block whose verdict is known, `next` those of the block after it,
  // and nothing is under way. Both arms are straight lines: a product under way across a branch would make
  // the compiler serialise all of them.
  const auto step = [&](auto& current, auto& next) BSFA_INLINE_LAMBDA {
    if (verdict.keep) {
      absorb(current);
      start_scores(current);
      start_values();
      vote(next);
      finish_product<1>(current);
      release_keys();
      finish_product<0>(output);
      release_values();
    } else {
      pass_values_by();
      start_scores(current);
      vote(next);
      finish_product<0>(current);
      release_keys();
    }
  };
  start_scores(scores0);
  finish_product<0>(scores0);
  release_keys();
  start_scores(scores1);
  vote(scores0);
  finish_product<0>(scores1);
  release_keys();
  int steps = overlapped - 2;
  for (; steps >= 2; steps -= 2) {
    step(scores0, scores1);
    step(scores1, scores0);
  }
  if (steps == 1) {
    step(scores0, scores1);
    CUTE_UNROLL
    for (int i = 0; i < size(scores0); ++i) {
      const float score = scores0(i);
      scores0(i) = scores1(i);
      scores1(i) = score;
    }
  }

  // The last two blocks.
  if (verdict.keep) {
    absorb(scores0);
    start_values();
    vote(scores1);
    finish_product<0>(output);
    release_values();
  } else {
    pass_values_by();
    vote(scores1);
  }
  if (verdict.keep) {
    absorb(scores1);
    start_values();
    finish_product<0>(output);
    release_values();
  } else {
    pass_values_by();
  }
  return kept;
}

}  // namespace bsfa::sm90
