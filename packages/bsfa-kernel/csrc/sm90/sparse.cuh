// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// A consumer warpgroup's pass over the key blocks of a tile with thresholds: vote, and multiply V only for
// kept blocks. docs/kernel-sm90.md says what overlaps what.
#pragma once

#include "consumer.cuh"

namespace bsfa::sm90 {

// What scores are compared with.
enum class Bounds {
  kPositive,     // the threshold
  kNotPositive,  // the threshold
  kRelative      // the threshold and a reference, which each row makes of its peaks
};

// The left operand of Q K^T.
template <class Config, class Mma>
__device__ __forceinline__ auto sparse_queries(typename Config::SharedStorage& storage,
                                               const ConsumerThread& who, const Mma& mma) {
  if constexpr (Config::kSparseQueriesInRegisters) {
    auto queries = queries_fragment<Config, Config::kHeadDim>(storage, mma);
    load_queries<Config, Config::kHeadDim>(storage, who, mma, queries);
    return queries;
  } else {
    return mma.get_slice(0).partition_fragment_A(
        queries_in_memory<Config, Config::kHeadDim>(storage, uniform(who.warpgroup)));
  }
}

// Returns the number of blocks kept.
template <class Config, Bounds kBounds, class Output>
__device__ __forceinline__ int attend_sparse(const TileContext<Config>& context, Output& output,
                                             Softmax& softmax) {
  using namespace cute;
  using Element = typename Config::Element;
  constexpr bool kRelative = kBounds == Bounds::kRelative;
  constexpr int kInHand = Config::kScoresInHand;
  auto& storage = context.storage;
  auto& pipelines = context.pipelines;
  const ForwardParams& params = context.params;
  const Tile& tile = context.tile;
  const ConsumerBlock& block = context.block;
  const ConsumerThread who = context.who;
  const bool halved = params.q_block < Config::kTileQ;
  const float scale_log2 = params.scale * CUDART_L2E_F;

  // Operands.
  typename Config::SparseScoresMma scores_mma;
  typename Config::ValuesMma values_mma;
  const auto scores_slice = scores_mma.get_slice(who.thread);
  const auto values_slice = values_mma.get_slice(who.thread);
  const auto smem_k = make_tensor(make_smem_ptr(storage.k), typename Config::SmemK{});
  const auto smem_v = make_tensor(make_smem_ptr(storage.v), typename Config::SmemV{});
  auto tSrQ = sparse_queries<Config>(storage, who, scores_mma);  // (MMA, 1, MMA_K)
  const auto tSrK = scores_slice.partition_fragment_B(smem_k);   // (MMA, 1, MMA_K, stage)
  const auto tOrV = values_slice.partition_fragment_B(smem_v);   // (MMA, 1, MMA_K, stage)
  using Accumulators = decltype(partition_fragment_C(scores_mma, Shape<_64, _64>{}));
  Accumulators scores0;
  Accumulators scores1;
  Accumulators scores2;
  auto probabilities = make_tensor<Element>(
      values_slice.partition_fragment_A(make_tensor<Element>(Shape<_64, _64>{})).layout());

  // Where scores are compared with a reference, each thread of a quad ends up with the peak of one row.
  constexpr int kVotingRows = kRelative ? 1 : kThreadRows;
  const float threshold = block.threshold;
  bool votes[kVotingRows];
  CUTE_UNROLL
  for (int i = 0; i < kVotingRows; ++i) {
    const int row = who.row(kRelative ? who.thread % kThreadRows : i);
    votes[i] = is_voter(params, block, tile.sequence, context.first_query() + row);
  }
  RowReference reference = RowReference::first(params, tile.head);
  // The row's peak in the block voted on last, from either half of the quad. The reference takes it in with
  // the next vote, so that nobody waits for the exchange.
  float half_peak = -CUDART_INF_F;
  float other_half_peak = -CUDART_INF_F;
  int kept = 0;
  // The keep bits of the warps that share this warpgroup's query block.
  const uint2 my_votes{!halved || who.warpgroup == 0 ? kKeepBits : 0,
                       !halved || who.warpgroup == 1 ? kKeepBits : 0};
  // Not 0 where both consumers keep the block last kept, for which they then ping-pong.
  uint32_t ping_pong = 0;

  // Steps.
  bool keys_seen = false;
  const auto look_for_keys = [&]() BSFA_INLINE_LAMBDA {
    pipelines.keys.advance();
    keys_seen = storage.k_full[pipelines.keys.stage()].test_wait(pipelines.keys.phase());
  };
  const auto start_scores = [&](auto& scores) BSFA_INLINE_LAMBDA {
    wait_unless(uniform(keys_seen), storage.k_full[pipelines.keys.stage()], pipelines.keys.phase());
    start_gemm<false>(scores_mma, tSrQ, tSrK(_, _, _, pipelines.keys.stage()), scores);
  };
  const auto await_values = [&]() BSFA_INLINE_LAMBDA {
    wait(storage.v_full[pipelines.values.stage()], pipelines.values.phase());
  };
  const auto release_values = [&]() BSFA_INLINE_LAMBDA {
    release_branchless(storage.v_empty[pipelines.values.stage()], who);
    pipelines.values.advance();
  };
  // What the thread's scores of each row come to in a vote.
  const auto find_largest = [&](auto& scores, float (&values)[kThreadRows]) BSFA_INLINE_LAMBDA {
    if constexpr (kRelative) {
      row_maxima<true>(accumulator_matrix(scores), values);
    } else {
      scores_against<kBounds == Bounds::kPositive>(accumulator_matrix(scores), values);
    }
  };
  // Whether a row of the thread votes to keep. One with a score of NaN does. Not one function with the above,
  // so that ptxas has the maxima to put between the wgmma that are issued in between.
  const auto passes = [&](const float (&values)[kThreadRows]) BSFA_INLINE_LAMBDA {
    bool pass = false;
    if constexpr (kRelative) {
      reference.take(params.rule, ptx::max_nan(half_peak, other_half_peak));
      half_peak = params.scale * pair_row_max(values);
      other_half_peak = __shfl_xor_sync(0xffffffff, half_peak, 2);
      pass = votes[0] & !(reference.excess(half_peak) < threshold);
    } else {
      CUTE_UNROLL
      for (int row = 0; row < kThreadRows; ++row) {
        pass |= votes[row] & !(params.scale * values[row] < threshold);
      }
    }
    return pass;
  };
  // The stage of the block that was started before `after` others.
  const auto release_keys = [&](int after) BSFA_INLINE_LAMBDA {
    const PipelineState<Config::kKeyStages> state{pipelines.keys.count - 1 - after};
    release_branchless(storage.k_empty[state.stage()], who);
  };
  const auto cast_vote = [&](bool keep) BSFA_INLINE_LAMBDA {
    publish<Config>(storage, pipelines.votes, who.warp(), keep);
    pipelines.votes.advance();
  };
  const auto vote_on = [&](auto& scores) BSFA_INLINE_LAMBDA {
    float values[kThreadRows];
    find_largest(scores, values);
    cast_vote(passes(values));
  };
  // A first look, beside a GEMM, at the votes on the block that was voted on before `after` others. Mostly
  // all are there.
  uint2 early_votes{};
  const auto look_for_votes = [&](int after) BSFA_INLINE_LAMBDA {
    early_votes = read_votes<Config>(storage, {pipelines.votes.count - 1 - after});
  };
  // The verdict on that block: whether this warpgroup keeps it.
  const auto hear_verdict = [&](int after) BSFA_INLINE_LAMBDA {
    const PipelineState<Config::kVoteStages> state{pipelines.votes.count - 1 - after};
    uint2 votes = early_votes;
    if (!are_votes_there(votes, state)) {
      votes = await_votes<Config>(storage, state);
    }
    // By masks in registers: with constants, ptxas would move the votes to uniform registers first.
    const uint32_t mine = (votes.x & my_votes.x) | (votes.y & my_votes.y);
    const uint32_t others = (votes.x & my_votes.y) | (votes.y & my_votes.x);
    if (mine != 0) {
      ++kept;
      ping_pong = others;
      return true;
    }
    // A block that only the other warpgroup keeps takes a stage of V all the same.
    if (others != 0) {
      if constexpr (!Config::kReleasesUnread) {
        await_values();
      }
      release_values();
    }
    return false;
  };
  // The verdict comes in two parts. At the end of a step, from the first look: whether the block may be kept;
  // mostly not, and that is all. At the start of the next step: the rest.
  bool may_keep = false;
  const auto judge_early = [&](int after) BSFA_INLINE_LAMBDA {
    may_keep =
        !do_all_skip(early_votes, PipelineState<Config::kVoteStages>{pipelines.votes.count - 1 - after});
  };
  // Where nothing comes between the look and the judgement.
  const auto decide = [&](int after) BSFA_INLINE_LAMBDA {
    look_for_votes(after);
    judge_early(after);
  };
  const auto keeps = [&](int after) BSFA_INLINE_LAMBDA { return may_keep && hear_verdict(after); };
  // O *= exp(m_old - m).
  const auto raise_maxima = [&](const RowFlags& rows, const auto& maxima) BSFA_INLINE_LAMBDA {
    float factors[kThreadRows];
    if (softmax.raise(rows, maxima, scale_log2, factors)) {
      scale_rows(output, factors);
    }
  };
  // P = exp(S - m).
  const auto exponentiate = [&](auto& scores) BSFA_INLINE_LAMBDA {
    float sums[kThreadRows];
    softmax.exponentiate_and_round(scores, probabilities, scale_log2, sums);
    const RowFlags rows = softmax.exceeded_by_sums(sums);
    if (rows.any()) {
      float maxima[kThreadRows];
      row_maxima(accumulator_matrix(scores), maxima);
      raise_maxima(rows, maxima);
      softmax.exponentiate_and_round(scores, probabilities, scale_log2, sums);
    }
    CUTE_UNROLL
    for (int row = 0; row < kThreadRows; ++row) {
      softmax.sum[row] += sums[row];
    }
  };
  const auto start_values = [&]() BSFA_INLINE_LAMBDA {
    start_gemm<true>(values_mma, probabilities, tOrV(_, _, _, pipelines.values.stage()), output);
  };

  // The blocks with masked scores, one by one; and the rest too where there is nothing to overlap.
  const int overlapped = tile.full / kInHand * kInHand;
  int visible[kThreadRows];
  context.visible_keys(visible);
  for (int key_block = tile.key_blocks - 1; key_block >= overlapped; --key_block) {
    const bool participates = key_block < block.keys.visible;
    const bool forced = participates && key_block >= block.undecided;
    start_scores(scores0);
    pipelines.keys.advance();
    finish_gemm<0>(scores0);
    release_keys(0);
    auto matrix = accumulator_matrix(scores0);
    mask_scores(matrix, who, visible, key_block * kKeyBlock);
    float values[kThreadRows];
    find_largest(scores0, values);
    const bool passed = passes(values);
    cast_vote(forced || (participates && passed));
    decide(0);
    if (keeps(0)) {
      exponentiate(scores0);
      await_values();
      context.clear_foreign_values(pipelines.values.stage(), key_block);
      start_values();
      finish_gemm<0>(output);
      release_values();
    }
  }
  if (overlapped == 0) {
    return kept;
  }

  // From here on the scores of later blocks are computed while a step handles one, so that the tensor cores
  // have work while consumers vote and exponentiate. When a step begins, `current` and the block after it
  // have been voted on, and the GEMM of the one after that, `last`, is in flight. When it ends, so is the
  // GEMM of one more, in the registers of `current`. The vote on `last` is computed while wgmma are issued.
  // The votes on the block before it, which have been there for most of a step, are read in front of it. What
  // both arms end with stands after them, so that ptxas puts no further branch into either.
  const auto step = [&](auto& current, auto& last) BSFA_INLINE_LAMBDA {
    float values[kThreadRows];
    if (keeps(1)) {
      exponentiate(current);
      finish_gemm<0>(last);
      release_keys(0);
      await_values();
      if (ping_pong != 0) {
        pingpong_wait(who.warpgroup);
      }
      start_values();
      find_largest(last, values);
      start_scores(current);
      if (ping_pong != 0) {
        pingpong_signal(who.warpgroup);
      }
      look_for_votes(0);
      cast_vote(passes(values));
      finish_gemm<1>(output);
      release_values();
    } else {
      finish_gemm<0>(last);
      find_largest(last, values);
      start_scores(current);
      release_keys(0);
      look_for_votes(0);
      cast_vote(passes(values));
    }
    look_for_keys();
    judge_early(1);
  };
  // Where only two blocks are in hand, `last` follows `current`. It is voted on before `current` is handled,
  // so that the verdict is there a step later.
  const auto step_of_two = [&](auto& current, auto& last) BSFA_INLINE_LAMBDA {
    finish_gemm<0>(last);
    release_keys(0);
    vote_on(last);
    decide(1);
    if (keeps(1)) {
      exponentiate(current);
      await_values();
      if (ping_pong != 0) {
        pingpong_wait(who.warpgroup);
      }
      start_values();
      start_scores(current);
      if (ping_pong != 0) {
        pingpong_signal(who.warpgroup);
      }
      finish_gemm<1>(output);
      release_values();
    } else {
      start_scores(current);
    }
    look_for_keys();
  };
  const auto finish = [&](auto& scores, int after) BSFA_INLINE_LAMBDA {
    if (keeps(after)) {
      exponentiate(scores);
      await_values();
      start_values();
      finish_gemm<0>(output);
      release_values();
    }
  };

  start_scores(scores0);
  pipelines.keys.advance();
  finish_gemm<0>(scores0);
  start_scores(scores1);
  pipelines.keys.advance();
  release_keys(1);
  vote_on(scores0);
  if constexpr (kInHand == 3) {
    finish_gemm<0>(scores1);
    start_scores(scores2);
    look_for_keys();
    release_keys(1);
    vote_on(scores1);
    decide(1);
  }
#pragma unroll 1
  for (int steps = overlapped - kInHand; steps > 0; steps -= kInHand) {
    if constexpr (kInHand == 3) {
      step(scores0, scores2);
      step(scores1, scores0);
      step(scores2, scores1);
    } else {
      step_of_two(scores0, scores1);
      step_of_two(scores1, scores0);
    }
  }

  // The blocks in hand.
  auto& last = kInHand == 3 ? scores2 : scores1;
  finish_gemm<0>(last);
  release_keys(0);
  vote_on(last);
  if constexpr (kInHand == 3) {
    finish(scores0, 2);
    decide(1);
    finish(scores1, 1);
  } else {
    decide(1);
    finish(scores0, 1);
  }
  decide(0);
  finish(last, 0);
  return kept;
}

}  // namespace bsfa::sm90
