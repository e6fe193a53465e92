// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// attend_blocks in the geometry 64x64 where there are few stages: both consumers walk over the blocks in
// either list, and each leaves out those that are not in its own.
#pragma once

#include "attend_pass.cuh"
#include "attend_producer.cuh"
#include "dense_single.cuh"
#include "roles.cuh"

namespace bsfa::sm90 {

template <class Config>
struct UnionProducer : ListProducer<Config> {
  using Element = typename Config::Element;
  using ListProducer<Config>::params;
  using ListProducer<Config>::storage;

  // A warp for K and one for V. kPaged: keys and values lie in pages. kTells: tells the consumers what the
  // blocks are.
  template <bool kPaged, bool kTells, int kStages>
  __device__ __forceinline__ void load_union(const CUtensorMap& map,
                                             cutlass::arch::ClusterTransactionBarrier (&full)[kStages],
                                             cutlass::arch::ClusterBarrier (&empty)[kStages],
                                             Element* blocks) const {
    const AttendParams& attend = params.order.attend;
    PipelineState<kStages> state;
    for_each_taken_tile<Config, 32>(storage, [&](const ListTile& tile) BSFA_INLINE_LAMBDA {
      const PagedLoads<kKeyBlock> loads(attend, tile.sequence);
      BlockList list(attend, tile, tile.blocks[0], tile.blocks[1]);
      int next = list.next();
#pragma unroll 1
      while (next >= 0) {
        const int listed = next;
        const int key_block = listed / 4;
        next = list.next();
        PagedRow found{};
        if constexpr (kPaged) {
          found = loads.find(key_block * kKeyBlock);
        }
        const int stage = state.stage();
        wait(empty[stage], state.phase() ^ 1);
        if constexpr (kTells) {
          if (ptx::is_elected()) {  // that which arrives at full[stage]
            storage.blocks[stage] = listed | (next < 0 ? kLastBlock : 0);
          }
        }
        load_listed_block<Config, kPaged>(map, full[stage], loads, found, attend, tile,
                                          key_row(tile.sequence, key_block),
                                          blocks + stage * Config::kBlockElements, Config::kBoxElements);
        state.advance();
      }
    });
  }

  template <bool kPaged>
  __device__ __forceinline__ void load_keys() const {
    load_union<kPaged, true>(params.k, storage.k_full, storage.k_empty, storage.k);
  }
  template <bool kPaged>
  __device__ __forceinline__ void load_values() const {
    load_union<kPaged, false>(params.v, storage.v_full, storage.v_empty, storage.v);
  }
};

// The next tile, which has key blocks for some consumer. Within a run of blocks that are the consumer's own,
// S of one is computed beside P V of the one before. Before a block that is not, P V is finished: a consumer
// that held V while it waits for a later K could keep the other one from getting there.
template <class Config>
__device__ __forceinline__ void attend_union(typename Config::SharedStorage& storage,
                                             ConsumerPipelines<Config>& pipelines, const AttendParams& params,
                                             const ConsumerThread& who) {
  using namespace cute;
  using Element = typename Config::Element;
  const float scale_log2 = params.scale * CUDART_L2E_F;
  const int slot = pipelines.queries.count % Config::kTileSlots;
  const ListTile& tile = storage.tiles[slot];

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
  Softmax softmax;
  clear(output);

  const int full = uniform(tile.blocks[who.warpgroup].keys.full);
  int visible[kThreadRows];
  const Visibility sees{tile.sequence.seqlen_q, tile.sequence.seqlen_k, params.causal};
  CUTE_UNROLL
  for (int row = 0; row < kThreadRows; ++row) {
    visible[row] = sees.keys(tile.first_query + who.warpgroup * Config::kWarpgroupQ + who.row(row));
  }
  bool pending = false;  // P of the block before, whose V is next

  const auto await_values = [&]() BSFA_INLINE_LAMBDA {
    wait(storage.v_full[pipelines.values.stage()], pipelines.values.phase());
  };
  const auto start_values = [&]() BSFA_INLINE_LAMBDA {
    start_gemm<true>(values_mma, probabilities, tOrV(_, _, _, pipelines.values.stage()), output);
  };
  const auto release_values = [&]() BSFA_INLINE_LAMBDA {
    release(storage.v_empty[pipelines.values.stage()], who);
    pipelines.values.advance();
  };
  const auto multiply_pending = [&]() BSFA_INLINE_LAMBDA {
    start_values();
    finish_gemm<0>(output);
    release_values();
  };

  block_scores.load(storage, who);
  pipelines.queries.advance();
  bool is_last = false;
#pragma unroll 1
  while (!is_last) {
    wait(storage.k_full[pipelines.keys.stage()], pipelines.keys.phase());
    const int listed = uniform(storage.blocks[pipelines.keys.stage()]);
    is_last = (listed & kLastBlock) != 0;
    const int key_block = (listed & ~kLastBlock) / 4;
    const bool is_mine = (listed >> who.warpgroup & 1) != 0;
    if (!uniform(is_mine)) {
      __syncwarp();
      release(storage.k_empty[pipelines.keys.stage()], who);
      pipelines.keys.advance();
      if (pending) {
        multiply_pending();
        pending = false;
      }
      await_values();
      release_values();
      continue;
    }
    block_scores.start(storage, pipelines.keys.stage(), scores);
    if (pending) {
      multiply_pending();
    }
    finish_gemm<0>(scores);
    release(storage.k_empty[pipelines.keys.stage()], who);
    pipelines.keys.advance();
    auto matrix = accumulator_matrix(scores);
    if (key_block >= full) {
      mask_scores(matrix, who, visible, key_block * kKeyBlock);
    }
    float factors[kThreadRows];
    if (softmax.raise_where_exceeded(matrix, scale_log2, factors)) {
      scale_rows(output, factors);
    }
    softmax.exponentiate(matrix, scale_log2);
    round_to(probabilities, scores);
    await_values();
    clear_foreign_values<Config>(params, tile.sequence, who,
                                 storage.v + pipelines.values.stage() * Config::kBlockElements, key_block);
    pending = true;
  }
  release(storage.q_empty, who);
  if (pending) {
    multiply_pending();
  }
  store_list<Config>(storage, params, who, slot, output, softmax);
}

template <class Config>
__device__ __forceinline__ void consume_unions(const AttendParams& params,
                                               typename Config::SharedStorage& storage,
                                               const ConsumerThread& who) {
  using namespace cute;
  ConsumerPipelines<Config> pipelines;
  const auto slot = [&]() BSFA_INLINE_LAMBDA { return pipelines.queries.count % Config::kTileSlots; };
  const auto is_end = [&]() BSFA_INLINE_LAMBDA {
    wait(storage.q_full, pipelines.queries.phase());
    return read_flag(storage.tiles[slot()].is_end);
  };
#pragma unroll 1
  while (!is_end()) {
    const ListTile& tile = storage.tiles[slot()];
    if (uniform(max(tile.lengths[0], tile.lengths[1]) > 0)) {
      attend_union<Config>(storage, pipelines, params, who);
    } else {
      const int stored = slot();
      release(storage.q_empty, who);
      pipelines.queries.advance();
      auto output = partition_fragment_C(typename Config::ValuesMma{}, Shape<_64, Int<Config::kHeadDim>>{});
      clear(output);
      store_list<Config>(storage, params, who, stored, output, Softmax{});
    }
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    attend_union_kernel(const __grid_constant__ AttendKernelParams params) {
  using Storage = typename Config::SharedStorage;
  const auto initialize = [&](Storage& storage) {
    prefetch(params);
    initialize_load_barriers<Config>(storage);
    initialize_stages(storage.tile_full, storage.tile_empty, Config::kConsumerWarps + 2);  // and the loaders
  };
  const auto produce = [&](Storage& storage, int warp) BSFA_INLINE_LAMBDA {
    produce_lists(UnionProducer<Config>{{params, storage}}, params.order.attend, warp);
  };
  run_roles<Config>(initialize, produce, [&](Storage& storage, const ConsumerThread& who) BSFA_INLINE_LAMBDA {
    consume_unions<Config>(params.order.attend, storage, who);
  });
}

}  // namespace bsfa::sm90
