// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The producers: one thread loads Q and K ahead of the consumers, another loads V on demand.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "barriers.cuh"
#include "config.cuh"

namespace bsfa::sm90 {

template <class Config>
struct Producer {
  using Storage = typename Config::SharedStorage;
  using Element = typename Config::Element;

  const KernelParams& params;
  Storage& storage;

  // One thread. Runs ahead as far as the stages of K allow, into the next tiles too, and publishes the
  // tiles to the consumers.
  __device__ __forceinline__ void load_queries_and_keys() const {
    PipelineState<Config::kKeyStages> keys;
    PipelineState<Config::kVoteStages> vote_state;
    PipelineState<1> queries;
    for_each_index(params.tiles, [&](int index) BSFA_INLINE_LAMBDA {
      wait(storage.q_empty, queries.phase() ^ 1);
      Tile tile;
      place_tile(params.forward, params.schedule, index, Config::kTileQ, tile);
      const int batch = batch_coordinate(params.forward, tile.sequence);
      // Before the thresholds are read, to hide that, even for a tile that turns out to have no keys. Bytes
      // may arrive before they are expected: the phase cannot end before the arrival below.
      const int first_query = query_row(tile.sequence, tile.first_query);
      for (int consumer = 0; consumer < Config::kConsumers; ++consumer) {
        for (int box = 0; box < Config::kBoxes; ++box) {
          load(params.q, storage.q_full, cute::TMA::CacheHintSm90::EVICT_FIRST,
               storage.q + (consumer * Config::kBoxes + box) * Config::kBoxElements, box,
               first_query + consumer * Config::kWarpgroupQ, tile.head, batch);
        }
      }
      find_blocks(params.forward, Config::kTileQ, tile);
      storage.tiles[queries.count % Config::kTileSlots] = tile;
      storage.q_full.arrive_and_expect_tx(Config::kTileQBytes);
      queries.advance();
#pragma unroll 1
      for (int key_block = tile.key_blocks - 1; key_block >= 0; --key_block) {
        const int stage = keys.stage();
        wait(storage.k_empty[stage], keys.phase() ^ 1);
        // Votes may come as soon as the keys are there.
        if (!tile.dense) {
          wait(storage.votes_empty[vote_state.stage()], vote_state.phase() ^ 1);
          vote_state.advance();
        }
        storage.k_full[stage].arrive_and_expect_tx(Config::kBlockBytes);
        Element* buffer =
            storage.k + stage / 2 * 2 * Config::kBlockElements + stage % 2 * Config::kBoxElements;
        for (int box = 0; box < Config::kBoxes; ++box) {
          load(params.k, storage.k_full[stage], cute::TMA::CacheHintSm90::EVICT_LAST,
               buffer + 2 * box * Config::kBoxElements, box, key_row(tile.sequence, key_block), tile.kv_head,
               batch);
        }
        keys.advance();
      }
    });
  }

  // One thread. Follows the verdicts, except where everything is kept anyway.
  __device__ __forceinline__ void load_values() const {
    PipelineState<Config::kVoteStages> vote_state;
    PipelineState<Config::kValueStages> values;
    for_each_index(params.tiles, [&](int index) BSFA_INLINE_LAMBDA {
      Tile tile;
      place_tile(params.forward, params.schedule, index, Config::kTileQ, tile);
      find_blocks(params.forward, Config::kTileQ, tile);
      const int batch = batch_coordinate(params.forward, tile.sequence);
#pragma unroll 1
      for (int key_block = tile.key_blocks - 1; key_block >= 0; --key_block) {
        bool load_block = true;
        if (!tile.dense) {
          wait(storage.votes_full[vote_state.stage()], vote_state.phase());
          const uint2 votes = read_votes<Config>(storage, vote_state);
          load_block = ((votes.x | votes.y) & kKeepBits) != 0;
          storage.votes_empty[vote_state.stage()].arrive();
          vote_state.advance();
        }
        if (load_block) {
          const int stage = values.stage();
          wait(storage.v_empty[stage], values.phase() ^ 1);
          storage.v_full[stage].arrive_and_expect_tx(Config::kBlockBytes);
          Element* buffer = storage.v + stage * Config::kBlockElements;
          for (int box = 0; box < Config::kBoxes; ++box) {
            load(params.v, storage.v_full[stage], cute::TMA::CacheHintSm90::EVICT_LAST,
                 buffer + box * Config::kBoxElements, box, key_row(tile.sequence, key_block), tile.kv_head,
                 batch);
          }
          values.advance();
        }
      }
    });
  }

 private:
  __device__ __forceinline__ static void load(const CUtensorMap& map,
                                              cutlass::arch::ClusterTransactionBarrier& full,
                                              cute::TMA::CacheHintSm90 hint, Element* to, int box, int row,
                                              int head, int batch) {
    cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<uint64_t*>(&full), static_cast<uint64_t>(hint), to,
                                 box * Config::kBoxColumns, row, head, batch);
  }
};

}  // namespace bsfa::sm90
