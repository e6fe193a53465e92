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

// 64 rows, whose boxes of columns lie `column_elements` apart.
template <class Config>
__device__ __forceinline__ void load_rows(const CUtensorMap& map,
                                          cutlass::arch::ClusterTransactionBarrier& full,
                                          cute::TMA::CacheHintSm90 hint, typename Config::Element* to,
                                          int column_elements, int row, int head, int batch) {
  for (int box = 0; box < Config::kBoxes; ++box) {
    cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<uint64_t*>(&full), static_cast<uint64_t>(hint),
                                 to + box * column_elements, box * Config::kBoxColumns, row, head, batch);
  }
}

// The queries of a tile. Before they are expected, so that no other work delays them: the phase cannot end
// before arrive_and_expect_tx(kTileQBytes).
template <class Config>
__device__ __forceinline__ void load_tile_queries(const TensorMaps& maps, const Problem& problem,
                                                  const QueryTile& tile,
                                                  typename Config::SharedStorage& storage) {
  for (int consumer = 0; consumer < Config::kConsumers; ++consumer) {
    load_rows<Config>(maps.q, storage.q_full, cute::TMA::CacheHintSm90::EVICT_FIRST,
                      storage.q + consumer * Config::kBlockElements, Config::kBoxElements,
                      query_row(tile.sequence, tile.first_query) + consumer * Config::kWarpgroupQ, tile.head,
                      query_batch(problem, tile.sequence));
  }
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
    load_rows<Config>(map, full, cute::TMA::CacheHintSm90::EVICT_LAST, to, column_elements,
                      key_row(tile.sequence, key_block), tile.kv_head, batch);
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
      // Before the thresholds are read, to hide that, even for a tile that turns out to have no keys.
      if (is_speaker<kPaged>()) {
        load_tile_queries<Config>(params, params.forward, tile, storage);
      }
      find_blocks<Config::kStepBlocks>(params.forward, Config::kTileQ, tile);
      if constexpr (kPaged) {
        __syncwarp();  // no lane is a tile ahead of the one that speaks
      }
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
