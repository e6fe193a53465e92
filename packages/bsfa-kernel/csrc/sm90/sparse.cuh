// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// A consumer warpgroup's pass over the key blocks of a tile with thresholds: vote, and multiply V only for
// kept blocks. docs/kernel-sm90.md says what overlaps what.
#pragma once

#include "consumer.cuh"

namespace bsfa::sm90 {

// The scores of a key block, and their maxima over the thread's columns.
template <class Accumulators>
struct BlockScores {
  Accumulators accumulators;
  float maxima[kThreadRows];
};

// kRelative: the bounds depend on what has been kept so far, so that a block can be voted on only when the
// verdict on the one before it is known. Otherwise the vote comes as soon as the scores are there.
// Returns the number of blocks kept.
template <class Config, bool kRelative, class Output>
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
  const auto smem_k = make_tensor(make_smem_ptr(storage.k), typename Config::SmemK{});
  const auto smem_v = make_tensor(make_smem_ptr(storage.v), typename Config::SmemV{});
  auto tSrQ = load_queries<Config>(context, scores_mma);        // (MMA, 1, MMA_K)
  const auto tSrK = scores_slice.partition_fragment_B(smem_k);  // (MMA, 1, MMA_K, stage)
  const auto tOrV = values_slice.partition_fragment_B(smem_v);  // (MMA, 1, MMA_K, stage)
  using Accumulators = decltype(partition_fragment_C(scores_mma, Shape<_64, _64>{}));
  BlockScores<Accumulators> scores0;
  BlockScores<Accumulators> scores1;
  auto probabilities = make_tensor<Element>(
      values_slice.partition_fragment_A(make_tensor<Element>(Shape<_64, _64>{})).layout());

  // What the scaled scores of a row must reach; NaN where a row must not or cannot vote.
  const float threshold = block.threshold == CUDART_INF_F ? CUDART_NAN_F : block.threshold;
  float bounds[kThreadRows];
  CUTE_UNROLL
  for (int row = 0; row < kThreadRows; ++row) {
    const bool votes = context.first_query() + who.row(row) < tile.sequence.seqlen_q;
    bounds[row] = votes ? threshold + (kRelative ? -CUDART_INF_F : 0.0f) : CUDART_NAN_F;
  }
  int kept = 0;
  Verdict verdict{};

  // Which warps' votes make this warpgroup keep a block.
  const uint32_t listens0 = !halved || who.warpgroup == 0 ? kKeepBits : 0;
  const uint32_t listens1 = !halved || who.warpgroup == 1 ? kKeepBits : 0;

  // Steps.
  bool keys_are_there = false;
  const auto look_for_keys = [&]() BSFA_INLINE_LAMBDA {
    keys_are_there = uniform(storage.k_full[rings.keys.stage()].test_wait(rings.keys.phase()));
  };
  const auto start_scores = [&](auto& scores) BSFA_INLINE_LAMBDA {
    wait_unless(keys_are_there, storage.k_full[rings.keys.stage()], rings.keys.phase());
    start_product<false>(scores_mma, tSrQ, tSrK(_, _, _, rings.keys.stage()), scores.accumulators);
  };
  const auto start_values = [&]() BSFA_INLINE_LAMBDA {
    wait(storage.v_full[rings.values.stage()], rings.values.phase());
    start_product<true>(values_mma, probabilities, tOrV(_, _, _, rings.values.stage()), output);
  };
  const auto release_values = [&]() BSFA_INLINE_LAMBDA {
    context.release(storage.v_empty[rings.values.stage()]);
    rings.values.advance();
  };
  const auto passes = [&](auto& scores) BSFA_INLINE_LAMBDA {
    row_maxima(accumulator_matrix(scores.accumulators), scores.maxima);
    bool keeps = false;
    CUTE_UNROLL
    for (int row = 0; row < kThreadRows; ++row) {
      keeps |= params.scale * scores.maxima[row] >= bounds[row];
    }
    return keeps;
  };
  const auto release_keys = [&]() BSFA_INLINE_LAMBDA {
    const Ring<Config::kKeyStages> place{rings.keys.count - 1};  // of the block started last
    context.release(storage.k_empty[place.stage()]);
  };
  const auto cast_vote = [&](bool keeps) BSFA_INLINE_LAMBDA {
    publish<Config>(storage, rings.ballots, who.warp(), keeps);
    rings.ballots.advance();
  };
  // On the block that was voted on last.
  const auto hear_verdict = [&]() BSFA_INLINE_LAMBDA {
    const uint2 votes = await_votes<Config>(storage, {rings.ballots.count - 1});
    verdict = {uniform(((votes.x & listens0) | (votes.y & listens1)) != 0),
               uniform(((votes.x | votes.y) & kKeepBits) != 0)};
    kept += verdict.keep;
  };
  // P = exp(S - m), O *= exp(m_old - m), and the bounds that follow.
  const auto absorb = [&](auto& scores) BSFA_INLINE_LAMBDA {
    float factors[kThreadRows];
    if (softmax.raise(scores.maxima, scale_log2, factors)) {
      scale_rows(output, factors);
    }
    auto matrix = accumulator_matrix(scores.accumulators);
    softmax.exponentiate(matrix, scale_log2);
    round_to(probabilities, scores.accumulators);
    if constexpr (kRelative) {
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
    if (verdict.load && who.thread % 32 == 0) {
      storage.v_empty[rings.values.stage()].arrive();
    }
    rings.values.count += verdict.load;
  };

  // The blocks with masked scores, one by one; and the rest too where there is nothing to overlap.
  const int overlapped = tile.full >= 2 ? tile.full : 0;
  int visible[kThreadRows];
  context.visible_keys(visible);
  for (int key_block = tile.key_blocks - 1; key_block >= overlapped; --key_block) {
    const bool participates = key_block < block.keys.visible;
    const bool forced = participates && key_block >= block.undecided;
    start_scores(scores0);
    rings.keys.advance();
    finish_product<0>(scores0.accumulators);
    release_keys();
    auto matrix = accumulator_matrix(scores0.accumulators);
    mask_scores(matrix, who, visible, key_block * kKeyBlock);
    const bool passed = passes(scores0);
    cast_vote(forced || (participates && passed));
    hear_verdict();
    if (verdict.keep) {
      absorb(scores0);
      wait(storage.v_full[rings.values.stage()], rings.values.phase());
      context.clear_foreign_values(rings.values.stage(), key_block);
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

  // From here on a step computes the scores of one block while the verdict on the block before arrives. At
  // its start `current` has the scores of a block whose verdict is known, `next` those of the block after it,
  // which has been voted on unless the rule is relative, and nothing is under way. Both arms are straight
  // lines: a product under way across a branch would make the compiler serialise all of them. The consumers
  // take turns, so that one computes scores while the other votes or exponentiates.
  const auto step = [&](auto& current, auto& next) BSFA_INLINE_LAMBDA {
    if (verdict.keep) {
      absorb(current);
      take_turn(who.warpgroup);
      start_scores(current);
      start_values();
      pass_turn(who.warpgroup);
      rings.keys.advance();
      look_for_keys();
      if constexpr (kRelative) {
        cast_vote(passes(next));
      }
      hear_verdict();
      finish_product<1>(current.accumulators);
      release_keys();
      if constexpr (!kRelative) {
        cast_vote(passes(current));
      }
      finish_product<0>(output);
      release_values();
    } else {
      pass_values_by();
      take_turn(who.warpgroup);
      start_scores(current);
      pass_turn(who.warpgroup);
      rings.keys.advance();
      look_for_keys();
      if constexpr (kRelative) {
        cast_vote(passes(next));
      }
      hear_verdict();
      finish_product<0>(current.accumulators);
      release_keys();
      if constexpr (!kRelative) {
        cast_vote(passes(current));
      }
    }
  };
  start_scores(scores0);
  rings.keys.advance();
  finish_product<0>(scores0.accumulators);
  release_keys();
  start_scores(scores1);
  rings.keys.advance();
  cast_vote(passes(scores0));
  hear_verdict();
  finish_product<0>(scores1.accumulators);
  release_keys();
  if constexpr (!kRelative) {
    cast_vote(passes(scores1));
  }
  int steps = overlapped - 2;
  for (; steps >= 2; steps -= 2) {
    step(scores0, scores1);
    step(scores1, scores0);
  }
  if (steps == 1) {
    step(scores0, scores1);
    const auto scores = scores0;
    scores0 = scores1;
    scores1 = scores;
  }

  // The last two blocks.
  if (verdict.keep) {
    absorb(scores0);
    start_values();
    if constexpr (kRelative) {
      cast_vote(passes(scores1));
    }
    hear_verdict();
    finish_product<0>(output);
    release_values();
  } else {
    pass_values_by();
    if constexpr (kRelative) {
      cast_vote(passes(scores1));
    }
    hear_verdict();
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
