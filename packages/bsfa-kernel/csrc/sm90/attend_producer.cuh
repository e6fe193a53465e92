// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The producers of attend_blocks: one thread takes tiles and loads their queries; one warp loads the keys and
// another the values that one of the consumers attends to, and tell the consumers where they are.
#pragma once

#include "attend_order.cuh"
#include "producer.cuh"

namespace bsfa::sm90 {

struct AttendKernelParams : TensorMaps {
  OrderParams order;
};

// One thread. Takes the next tile when the consumers have begun the one before, and loads its queries.
// describe(published, lengths): adds to the published tile what the kernel wants to know, given the length of
// each consumer's list.
template <class Config, class Describe>
__device__ __forceinline__ void take_tiles(const AttendKernelParams& params,
                                           typename Config::SharedStorage& storage,
                                           const Describe& describe) {
  const OrderParams& order = params.order;
  int next = blockIdx.x;
  for (uint32_t count = 0;; ++count) {
    const int slot = count % Config::kTileSlots;
    wait(storage.q_empty, count % 2 ^ 1);
    wait(storage.tile_empty[slot], count / Config::kTileSlots % 2 ^ 1);
    auto& published = storage.tiles[slot];
    if (next >= order.tiles) {
      published.end();
      keep_order();
      storage.tile_full[slot].arrive();
      storage.q_full.arrive();
      return;
    }
    const int4 record = *reinterpret_cast<const int4*>(&order.ordered[next]);
    next = gridDim.x + atomicAdd(order.taken, 1);
    const QueryTile tile = find_tile(order.attend, order.schedule, record.x, kAttendTileQ);
    load_tile_queries<Config>(params, order.attend, tile, storage);
    static_cast<QueryTile&>(published) = tile;
    published.is_end = false;
    describe(published, TileLength{record.y, record.z});
    keep_order();
    storage.tile_full[slot].arrive();
    storage.q_full.arrive_and_expect_tx(Config::kTileQBytes);
  }
}

// By a warp (kLanes = 32) or one thread of it that follows the tiles that are taken, as far ahead of the
// consumers as there are stages.
template <class Config, int kLanes, class Load>
__device__ __forceinline__ void for_each_taken_tile(typename Config::SharedStorage& storage,
                                                    const Load& load) {
  for (uint32_t count = 0;; ++count) {
    const int slot = count % Config::kTileSlots;
    wait(storage.tile_full[slot], count / Config::kTileSlots % 2);
    const auto& tile = storage.tiles[slot];
    if (tile.is_end) {
      return;
    }
    load(tile);
    if constexpr (kLanes > 1) {
      __syncwarp();
    }
    if (kLanes == 1 || ptx::is_elected()) {
      keep_order();
      storage.tile_empty[slot].arrive();
    }
  }
}

// By a warp. kPaged: the block lies where it was found in pages, else at `row`.
template <class Config, bool kPaged>
__device__ __forceinline__ void load_listed_block(const CUtensorMap& map,
                                                  cutlass::arch::ClusterTransactionBarrier& full,
                                                  const PagedLoads<kKeyBlock>& loads, const PagedRow& found,
                                                  const AttendParams& attend, const QueryTile& tile, int row,
                                                  typename Config::Element* to, int column_elements) {
  if (ptx::is_elected()) {
    full.arrive_and_expect_tx(Config::kBlockBytes);
    if constexpr (!kPaged) {
      load_rows<Config>(map, full, cute::TMA::CacheHintSm90::EVICT_LAST, to, column_elements, row,
                        tile.kv_head, key_batch(attend, tile.sequence));
    }
  }
  if constexpr (kPaged) {
    loads.template load<Config::kBoxes, Config::kBoxColumns>(map, full, found, tile.kv_head, to,
                                                             column_elements);
  }
}

// The roles of the producers: a thread, a warp for K and one for V.
template <class Producer>
__device__ __forceinline__ void produce_lists(const Producer& producer, const AttendParams& attend,
                                              int warp) {
  if (warp == 0) {
    if (ptx::is_elected()) {
      producer.take_all_tiles();
    }
  } else if (attend.has_pages()) {
    if (warp == 1) {
      producer.template load_keys<true>();
    } else if (warp == 2) {
      producer.template load_values<true>();
    }
  } else if (warp == 1) {
    producer.template load_keys<false>();
  } else if (warp == 2) {
    producer.template load_values<false>();
  }
}

template <class Config>
struct ListProducer {
  using Storage = typename Config::SharedStorage;
  using Element = typename Config::Element;

  const AttendKernelParams& params;
  Storage& storage;

  __device__ __forceinline__ void take_all_tiles() const {
    const AttendParams& attend = params.order.attend;
    take_tiles<Config>(params, storage, [&](ListTile& published, const TileLength& lengths) {
      for (int consumer = 0; consumer < Config::kConsumers; ++consumer) {
        const int length = lengths.blocks[consumer];
        published.blocks[consumer] = find_listed_block(
            attend, published.sequence, first_query_of(attend, published, consumer), length == kPoisoned);
        published.lengths[consumer] = length;
      }
    });
  }

  // A warp, for K or for V. Even lanes follow the list of the first consumer, odd ones that of the second;
  // lane i looks after stage i. A block in either list is loaded once. kPaged: keys and values lie in pages.
  template <bool kPaged>
  __device__ __forceinline__ void load_keys() const {
    load_blocks<kPaged>(params.k, storage.k, storage.keys);
  }
  template <bool kPaged>
  __device__ __forceinline__ void load_values() const {
    load_blocks<kPaged>(params.v, storage.v, storage.values);
  }

 private:
  template <bool kPaged, class Ring>
  __device__ __forceinline__ void load_blocks(const CUtensorMap& map, Element* blocks, Ring& ring) const {
    constexpr int kWords = 32 / Config::kConsumers;  // of each list, in the lanes
    const AttendParams& attend = params.order.attend;
    const int lane = threadIdx.x % 32;
    const int consumer = lane % Config::kConsumers;
    uint32_t written = 0;  // places of the consumer's list
    uint32_t free = 0;     // stages found to be free
    uint32_t rounds = 0;   // of each stage, modulo 2
    for_each_taken_tile<Config, 32>(storage, [&](const ListTile& tile) BSFA_INLINE_LAMBDA {
      const PagedLoads<kKeyBlock> loads(attend, tile.sequence);
      int remaining = max(tile.lengths[consumer], 0);
      const int visible = remaining > 0 ? tile.blocks[consumer].keys.visible : 0;
      const int full = tile.blocks[consumer].keys.full;
      const uint64_t* mask = find_words(attend, tile, tile.blocks[consumer].index);
      const int words = (max(visible, __shfl_xor_sync(0xffffffff, visible, 1)) + kMaskBits - 1) / kMaskBits;
      for (int first_word = (words - 1) / kWords * kWords; first_word >= 0; first_word -= kWords) {
        const uint64_t my_word = visible_word(mask, first_word + lane / Config::kConsumers, visible);
        uint32_t nonempty = __ballot_sync(0xffffffff, my_word != 0);
        while (nonempty != 0) {
          const int index = (31 - __clz(nonempty)) / Config::kConsumers;
          nonempty &= ~(~0u << index * Config::kConsumers);
          const uint64_t own = __shfl_sync(0xffffffff, my_word, index * Config::kConsumers + consumer);
          uint64_t either = own | __shfl_xor_sync(0xffffffff, own, 1);
          while (either != 0) {
            const int bit = 63 - __clzll(either);
            either &= ~(uint64_t{1} << bit);
            const bool attends = own >> bit & 1;
            const bool both = __all_sync(0xffffffff, attends);
            const int key_block = (first_word + index) * kMaskBits + bit;
            PagedRow found{};
            if constexpr (kPaged) {
              found = loads.find(key_block * kKeyBlock);
            }
            while (free == 0) {
              const int stage = min(lane, Config::kStages - 1);
              const bool is_free = ring.empty[stage].test_wait((rounds >> stage & 1) ^ 1);
              free = __ballot_sync(0xffffffff, is_free && lane < Config::kStages);
            }
            const int stage = __ffs(free) - 1;
            free &= free - 1;
            uint32_t where = stage | (rounds >> stage & 1) << place::kPhase;
            rounds ^= 1u << stage;
            if (!both && ptx::is_elected()) {
              // For the consumer that does not attend to the block, and will not touch the stage.
              ptx::arrive_times(cute::cast_smem_ptr_to_uint(&ring.empty[stage]),
                                Config::kConsumerWarps / Config::kConsumers);
            }
            load_listed_block<Config, kPaged>(map, ring.full[stage], loads, found, attend, tile,
                                              key_row(tile.sequence, key_block),
                                              blocks + stage * Config::kBlockElements, Config::kBoxElements);
            __syncwarp();
            if (attends) {
              --remaining;
              where |= (key_block >= full ? place::kMasked : 0) | (remaining == 0 ? place::kLast : 0);
              write(ring, consumer, written++, where, key_block);
              if (remaining == 0 && written % 2 != 0) {
                write(ring, consumer, written++, where | place::kMasked | place::kEmpty, place::kNoBlock);
              }
            }
            __syncwarp();
          }
        }
      }
    });
  }

  // By the first of a consumer's lanes.
  template <class Ring>
  __device__ __forceinline__ static void write(Ring& ring, int consumer, uint32_t number, uint32_t where,
                                               int key_block) {
    const uint32_t round = number / Config::kPlaces % 2 == 0 ? place::kRound : 0;  // memory begins with 0
    if (threadIdx.x % 32 < Config::kConsumers) {
      ptx::store_volatile(cute::cast_smem_ptr_to_uint(&ring.places[consumer][number % Config::kPlaces]),
                          where | round, key_block);
    }
  }
};

}  // namespace bsfa::sm90
