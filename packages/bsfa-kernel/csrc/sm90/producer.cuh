// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The producers: one loads Q and K ahead of the consumers, another loads V on demand.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "barriers.cuh"
#include "config.cuh"
#include "key_pages.cuh"

namespace bsfa::sm90 {

// One box of 64 rows.
template <class Config>
__device__ __forceinline__ void load_box(const CUtensorMap& map,
                                         cutlass::arch::ClusterTransactionBarrier& full,
                                         cute::TMA::CacheHintSm90 hint, typename Config::Element* to, int box,
                                         int row, int head, int batch) {
  cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<uint64_t*>(&full), static_cast<uint64_t>(hint), to,
                               box * Config::kBoxColumns, row, head, batch);
}

// Loads blocks of 64 keys of a tile's sequence.
template <class Config, bool kPaged>
struct KeyLoads {
  using Element = typename Config::Element;
  const Tile& tile;
  int batch;

  __device__ __forceinline__ KeyLoads(const ForwardParams& forward, const Tile& tile)
      : tile(tile), batch(key_batch(forward, tile.sequence)) {}
  __device__ __forceinline__ void advance() {}
  __device__ __forceinline__ void load(const CUtensorMap& map, cutlass::arch::ClusterTransactionBarrier& full,
                                       Element* to, int column_elements, int key_block) const {
    full.arrive_and_expect_tx(Config::kBlockBytes);
    for (int box = 0; box < Config::kBoxes; ++box) {
      load_box<Config>(map, full, cute::TMA::CacheHintSm90::EVICT_LAST, to + box * column_elements, box,
                       key_row(tile.sequence, key_block), tile.kv_head, batch);
    }
  }
};

// The same where they lie in pages.
template <class Config>
struct KeyLoads<Config, true> {
  using Element = typename Config::Element;
  PagedRun<kKeyBlock> run;
  int head;

  __device__ __forceinline__ KeyLoads(const ForwardParams& forward, const Tile& tile)
      : run(forward, tile.sequence, (tile.key_blocks - 1) * kKeyBlock), head(tile.kv_head) {}
  // To the key block before.
  __device__ __forceinline__ void advance() { run.advance(); }
  __device__ __forceinline__ void load(const CUtensorMap& map, cutlass::arch::ClusterTransactionBarrier& full,
                                       Element* to, int column_elements, int) const {
    if (threadIdx.x % 32 == 0) {
      full.arrive_and_expect_tx(Config::kBlockBytes);
    }
    run.template load<Config::kBoxes, Config::kBoxColumns>(map, full, head, to, column_elements);
  }
};

template <class Config>
struct Producer {
  using Storage = typename Config::SharedStorage;
  using Element = typename Config::Element;

  const KernelParams& params;
  Storage& storage;

  // Runs ahead as far as the stages of K allow, into the next tiles too, and publishes the tiles to the
  // consumers. One thread, or (kPaged: keys and values lie in pages) one warp.
  template <bool kPaged>
  __device__ __forceinline__ void load_queries_and_keys() const {
    PipelineState<Config::kKeyStages> keys;
    PipelineState<Config::kVoteStages> vote_state;
    PipelineState<1> queries;
    for_each_index(params.tiles, [&](int index) BSFA_INLINE_LAMBDA {
      wait(storage.q_empty, queries.phase() ^ 1);
      Tile tile;
      place_tile(params.forward, params.schedule, index, Config::kTileQ, tile);
      // Before the thresholds are read, to hide that, even for a tile that turns out to have no keys. Bytes
      // may arrive before they are expected: the phase cannot end before the arrival below.
      if (is_speaker<kPaged>()) {
        const int batch = query_batch(params.forward, tile.sequence);
        const int first_query = query_row(tile.sequence, tile.first_query);
        for (int consumer = 0; consumer < Config::kConsumers; ++consumer) {
          for (int box = 0; box < Config::kBoxes; ++box) {
            load_box<Config>(params.q, storage.q_full, cute::TMA::CacheHintSm90::EVICT_FIRST,
                             storage.q + (consumer * Config::kBoxes + box) * Config::kBoxElements, box,
                             first_query + consumer * Config::kWarpgroupQ, tile.head, batch);
          }
        }
      }
      find_blocks<Config::kStepBlocks>(params.forward, Config::kTileQ, tile);
      if (is_speaker<kPaged>()) {
        storage.tiles[queries.count % Config::kTileSlots] = tile;
        storage.q_full.arrive_and_expect_tx(Config::kTileQBytes);
      }
      queries.advance();
      KeyLoads<Config, kPaged> loads(params.forward, tile);
#pragma unroll 1
      for (int key_block = tile.key_blocks - 1; key_block >= 0; --key_block) {
        const int stage = keys.stage();
        wait(storage.k_empty[stage], keys.phase() ^ 1);
        // Votes may come as soon as the keys are there.
        if (!tile.dense) {
          wait(storage.votes_empty[vote_state.stage()], vote_state.phase() ^ 1);
          vote_state.advance();
        }
        loads.load(params.k, storage.k_full[stage], storage.k + Config::key_buffer(stage),
                   Config::kKeyColumnElements, key_block);
        loads.advance();
        keys.advance();
      }
    });
  }

  // Follows the verdicts, except where everything is kept anyway. One thread, or (kPaged) one warp.
  template <bool kPaged>
  __device__ __forceinline__ void load_values() const {
    PipelineState<Config::kVoteStages> vote_state;
    PipelineState<Config::kValueStages> values;
    for_each_index(params.tiles, [&](int index) BSFA_INLINE_LAMBDA {
      Tile tile;
      place_tile(params.forward, params.schedule, index, Config::kTileQ, tile);
      find_blocks<Config::kStepBlocks>(params.forward, Config::kTileQ, tile);
      KeyLoads<Config, kPaged> loads(params.forward, tile);
#pragma unroll 1
      for (int key_block = tile.key_blocks - 1; key_block >= 0; --key_block) {
        bool load_block = true;
        if (!tile.dense) {
          wait(storage.votes_full[vote_state.stage()], vote_state.phase());
          const uint2 votes = read_votes<Config>(storage, vote_state);
          load_block = ((votes.x | votes.y) & kKeepBits) != 0;
          if constexpr (kPaged) {
            __syncwarp();  // all lanes have read them
          }
          if (is_speaker<kPaged>()) {
            storage.votes_empty[vote_state.stage()].arrive();
          }
          vote_state.advance();
        }
        if (load_block) {
          const int stage = values.stage();
          wait(storage.v_empty[stage], values.phase() ^ 1);
          loads.load(params.v, storage.v_full[stage], storage.v + stage * Config::kBlockElements,
                     Config::kBoxElements, key_block);
          values.advance();
        }
        loads.advance();
      }
    });
  }

 private:
  // Which thread of a producer speaks to barriers and to the copy engine.
  template <bool kPaged>
  __device__ __forceinline__ static bool is_speaker() {
    return !kPaged || threadIdx.x % 32 == 0;
  }
};

}  // namespace bsfa::sm90
