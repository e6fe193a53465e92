// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The producers: one thread loads Q and K ahead of the consumers, another V on demand. In pages, another two
// warps take part.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "barriers.cuh"
#include "config.cuh"
#include "found_loads.cuh"

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

// Loads blocks of 64 keys of a tile's sequence, from the last to the first.
template <class Config, bool kPaged>
struct KeyLoads {
  using Element = typename Config::Element;
  using Storage = typename Config::SharedStorage;
  struct State {};  // of a producer, from tile to tile

  const Tile& tile;
  int batch;

  __device__ __forceinline__ KeyLoads(const ForwardParams& forward, const Tile& tile, Storage&, State&)
      : tile(tile), batch(key_batch(forward, tile.sequence)) {}
  // Before the stage is waited for.
  __device__ __forceinline__ void find() const {}
  __device__ __forceinline__ void load(const CUtensorMap& map, cutlass::arch::ClusterTransactionBarrier& full,
                                       Element* to, int column_elements, int key_block) const {
    full.arrive_and_expect_tx(Config::kBlockBytes);
    load_rows<Config>(map, full, cute::TMA::CacheHintSm90::EVICT_LAST, to, column_elements,
                      key_row(tile.sequence, key_block), tile.kv_head, batch);
  }
  // After each block, loaded or not.
  __device__ __forceinline__ void advance(bool) const {}
};

// The same where they lie in pages, in boxes that Producer::find_pages() has found.
template <class Config>
struct KeyLoads<Config, true> : FoundLoads<Config> {
  using State = PipelineState<FoundBoxes::kStages>;

  __device__ __forceinline__ KeyLoads(const ForwardParams& forward, const Tile& tile,
                                      typename Config::SharedStorage& storage, State& state)
      : FoundLoads<Config>(storage.found, state, forward, tile.kv_head) {}
  __device__ __forceinline__ void load(const CUtensorMap& map, cutlass::arch::ClusterTransactionBarrier& full,
                                       typename Config::Element* to, int column_elements, int) const {
    FoundLoads<Config>::load(map, full, to, column_elements);
  }
};

template <class Config>
struct Producer {
  using Storage = typename Config::SharedStorage;
  using Element = typename Config::Element;

  const KernelParams& params;
  Storage& storage;

  // Blocks that are skipped pass faster than one thread loads small boxes: then two share the loads of K.
  __device__ __forceinline__ static int key_loaders(const Problem& problem) {
    return boxes_bits<kKeyBlock>(problem) == 0 ? 1 : 2;
  }

  // Runs ahead as far as the stages of K allow, into the next tiles too, and publishes the tiles to the
  // consumers. One thread. kPaged: keys and values lie in pages. Of two key_loaders(), K of the even stages.
  template <bool kPaged>
  __device__ __forceinline__ void load_queries_and_keys() const {
    PipelineState<1> queries;
    load_keys<kPaged>(kPaged ? key_loaders(params.forward) : 1, 0,
                      [&](int index, Tile& tile) BSFA_INLINE_LAMBDA {
                        wait(storage.q_empty, queries.phase() ^ 1);
                        place_tile(params.forward, params.schedule, index, Config::kTileQ, tile);
                        // Before the thresholds are read, to hide that, even for a tile that turns out to
                        // have no keys.
                        load_tile_queries<Config>(params, params.forward, tile, storage);
                        find_blocks<Config::kStepBlocks>(params.forward, Config::kTileQ, tile);
                        storage.tiles[queries.count % Config::kTileSlots] = tile;
                        keep_order();
                        storage.q_full.arrive_and_expect_tx(Config::kTileQBytes);
                        queries.advance();
                      });
  }

  // K of the odd stages, in small boxes. One thread.
  __device__ __forceinline__ void load_other_keys() const {
    static_assert(Config::kKeyStages % 2 == 0);
    load_keys<true>(2, 1, [&](int index, Tile& tile) BSFA_INLINE_LAMBDA { find_whole_tile(index, tile); });
  }

  // Follows the verdicts, except where everything is kept anyway. One thread.
  template <bool kPaged>
  __device__ __forceinline__ void load_values() const {
    PipelineState<Config::kVoteStages> vote_state;
    PipelineState<Config::kValueStages> values;
    typename KeyLoads<Config, kPaged>::State pages;
    for_each_index(params.tiles, [&](int index) BSFA_INLINE_LAMBDA {
      Tile tile;
      find_whole_tile(index, tile);
      KeyLoads<Config, kPaged> loads(params.forward, tile, storage, pages);
#pragma unroll 1
      for (int key_block = tile.key_blocks - 1; key_block >= 0; --key_block) {
        loads.find();
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
          loads.load(params.v, storage.v_full[stage], storage.v + stage * Config::kBlockElements,
                     Config::kBoxElements, key_block);
          values.advance();
        }
        loads.advance(key_block == 0);
      }
    });
  }

  // Finds the boxes of all blocks, ahead of the loads of K and of V. One warp.
  __device__ __forceinline__ void find_pages() const {
    BoxFinder finder(storage.found, params.forward);
    for_each_index(params.tiles, [&](int index) BSFA_INLINE_LAMBDA {
      Tile tile;
      find_whole_tile(index, tile);
#pragma unroll 1
      for (int key_block = tile.key_blocks - 1; key_block >= 0; key_block -= finder.blocks()) {
        const int key = (key_block - finder.block()) * kKeyBlock + finder.row();
        finder.publish(find_paged_box(params.forward, tile.sequence, key, key >= 0));
      }
    });
  }

 private:
  __device__ __forceinline__ void find_whole_tile(int index, Tile& tile) const {
    place_tile(params.forward, params.schedule, index, Config::kTileQ, tile);
    find_blocks<Config::kStepBlocks>(params.forward, Config::kTileQ, tile);
  }

  // One of `loaders` threads, 1 or 2: that of the stages with remainder `loader`. begin(index, tile) finds a
  // tile.
  template <bool kPaged, class Begin>
  __device__ __forceinline__ void load_keys(int loaders, int loader, const Begin& begin) const {
    PipelineState<Config::kKeyStages> keys;
    PipelineState<Config::kVoteStages> vote_state;
    typename KeyLoads<Config, kPaged>::State pages;
    for_each_index(params.tiles, [&](int index) BSFA_INLINE_LAMBDA {
      Tile tile;
      begin(index, tile);
      KeyLoads<Config, kPaged> loads(params.forward, tile, storage, pages);
#pragma unroll 1
      for (int key_block = tile.key_blocks - 1; key_block >= 0; --key_block) {
        loads.find();
        if ((keys.count & (loaders - 1)) == loader) {
          const int stage = keys.stage();
          wait(storage.k_empty[stage], keys.phase() ^ 1);
          // Votes may come as soon as the keys are there.
          if (!tile.dense) {
            wait(storage.votes_empty[vote_state.stage()], vote_state.phase() ^ 1);
          }
          loads.load(params.k, storage.k_full[stage], storage.k + Config::key_buffer(stage),
                     Config::kKeyColumnElements, key_block);
        }
        if (!tile.dense) {
          vote_state.advance();
        }
        loads.advance(key_block == 0);
        keys.advance();
      }
    });
  }
};

}  // namespace bsfa::sm90
