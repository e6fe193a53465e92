// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The passes over tiles without thresholds where there are registers for the scores of one key block only,
// and for a part of Q.
#pragma once

#include "dense.cuh"

namespace bsfa::sm90 {

// The scores of a warpgroup's queries and of one key block. Columns of Q for which there are registers are
// read from there, the others from shared memory.
template <class Config>
class BlockScores {
  using Storage = typename Config::SharedStorage;
  static constexpr int kRegisterColumns = Config::kDenseRegisterColumns;
  static constexpr int kSteps = Config::kHeadDim / 16;  // of the GEMM
  static constexpr int kRegisterSteps = kRegisterColumns / 16;

 public:
  __device__ __forceinline__ explicit BlockScores(Storage& storage, const ConsumerThread& who)
      : registers_(queries_fragment<Config, kRegisterColumns>(storage, mma_)),
        shared_(typename Config::SharedScoresMma{}.get_slice(0).partition_fragment_A(
            queries_in_memory<Config, Config::kHeadDim>(storage, uniform(who.warpgroup)))) {}

  // Reads what goes to registers; the rest must stay in shared memory.
  __device__ __forceinline__ void load(Storage& storage, const ConsumerThread& who) {
    load_queries<Config, kRegisterColumns>(storage, who, mma_, registers_);
  }

  // Starts scores = Q K^T. Columns in registers and in shared memory take turns, since the latter need all of
  // its bandwidth.
  template <class Scores>
  __device__ __forceinline__ void start(Storage& storage, int stage, Scores& scores) {
    using namespace cute;
    const auto smem_k = make_tensor(make_smem_ptr(storage.k), typename Config::SmemK{});
    const auto keys = mma_.get_slice(0).partition_fragment_B(smem_k)(_, _, _, stage);  // (MMA, 1, MMA_K)
    typename Config::SharedScoresMma shared_mma;
    warpgroup_fence_operand(registers_);
    warpgroup_fence_operand(scores);
    warpgroup_arrive();
    mma_.accumulate_ = GMMA::ScaleOut::Zero;
    shared_mma.accumulate_ = GMMA::ScaleOut::One;
    CUTE_UNROLL
    for (int k = 0; k < kRegisterSteps; ++k) {
      gemm(mma_, registers_(_, _, k), keys(_, _, k), scores);
      mma_.accumulate_ = GMMA::ScaleOut::One;
      const int other = k + kRegisterSteps;
      if (other < kSteps) {
        gemm(shared_mma, shared_(_, _, other), keys(_, _, other), scores);
      }
    }
    CUTE_UNROLL
    for (int k = 2 * kRegisterSteps; k < kSteps; ++k) {
      gemm(shared_mma, shared_(_, _, k), keys(_, _, k), scores);
    }
    warpgroup_commit_batch();
    warpgroup_fence_operand(scores);
  }

 private:
  using Registers = decltype(queries_fragment<Config, kRegisterColumns>(
      std::declval<Storage&>(), std::declval<const typename Config::ScoresMma&>()));
  using Descriptors = decltype(typename Config::SharedScoresMma{}.get_slice(0).partition_fragment_A(
      queries_in_memory<Config, Config::kHeadDim>(std::declval<Storage&>(), 0)));

  typename Config::ScoresMma mma_;
  Registers registers_;  // (MMA, 1, MMA_K)
  Descriptors shared_;   // (MMA, 1, MMA_K), of all columns
};

// As attend_dense(), a block at a time.
template <class Config>
__device__ __forceinline__ int attend_dense_singly(typename Config::SharedStorage& storage,
                                                   ConsumerPipelines<Config>& pipelines,
                                                   const ForwardParams& params, const ConsumerThread& who,
                                                   int tiles) {
  using namespace cute;
  using Element = typename Config::Element;
  static_assert(Config::kStepBlocks == 1 && !Config::kReleasesUnread);
  const float scale_log2 = params.scale * CUDART_L2E_F;

  // Operands.
  BlockScores<Config> block_scores(storage, who);
  typename Config::ValuesMma values_mma;
  const auto values_slice = values_mma.get_slice(who.thread);
  const auto smem_v = make_tensor(make_smem_ptr(storage.v), typename Config::SmemV{});
  const auto tOrV = values_slice.partition_fragment_B(smem_v);  // (MMA, 1, MMA_K, stage)
  auto scores = partition_fragment_C(typename Config::ScoresMma{}, Shape<_64, _64>{});
  auto output = partition_fragment_C(values_mma, Shape<_64, Int<Config::kHeadDim>>{});
  auto probabilities = make_tensor<Element>(
      values_slice.partition_fragment_A(make_tensor<Element>(Shape<_64, _64>{})).layout());

  const typename Config::PublishedTile* published;
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
  const auto start_scores = [&]() BSFA_INLINE_LAMBDA {
    block_scores.start(storage, pipelines.keys.stage(), scores);
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
  const auto raise_maxima = [&](float (&factors)[kThreadRows]) BSFA_INLINE_LAMBDA {
    return softmax.raise_where_exceeded(accumulator_matrix(scores), scale_log2, factors);
  };
  // P = exp(S - m), in place.
  const auto exponentiate = [&]() BSFA_INLINE_LAMBDA {
    auto matrix = accumulator_matrix(scores);
    softmax.exponentiate(matrix, scale_log2);
  };
  // Ping-pong: one consumer's GEMMs overlap the other's exponentials, for which they take long enough. So V
  // is released before this consumer's exponentials, not beside them. The keys of the step are there when it
  // begins.
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
    finish_gemm<0>(output);
    release_values();
    exponentiate();
    round_to(probabilities, scores);
    if (raised) {
      scale_rows(output, factors);
    }
    if (key_block >= 1) {
      await_keys();
    }
  };

  const auto next_queries = [&]() BSFA_INLINE_LAMBDA {
    block_scores.load(storage, who);
    pipelines.queries.advance();
    await_keys();
  };

  const auto attend = [&](const TileContext<Config>& context) BSFA_INLINE_LAMBDA {
    const int full = uniform(published->full);
    int key_block = uniform(published->key_blocks) - 1;
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
  };
  return for_each_dense_tile<Config>(storage, pipelines, params, who, tiles, published, scores, output,
                                     softmax, next_queries, start_scores, attend, release_values);
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
