// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// attend_blocks in the geometry 128x64: both consumers have one list of key blocks, which goes through the
// dense pass of the forward kernel.
#pragma once

#include "attend_producer.cuh"
#include "dense_single.cuh"
#include "roles.cuh"

namespace bsfa::sm90 {

// A tile whose 128 queries are one sparsity block, as it is published to the consumers and to the other
// producers.
// `key_blocks` counts the places of its list, and the blocks of the places [0, full) hold no masked score;
// places are numbered as the dense pass visits them, from the last to the first.
struct SharedListTile : Tile {
  // Blocks that hold a masked score, and the block of an empty place, are among the first four visited.
  static constexpr int kFirstPlaces = 4;
  int first_blocks[kFirstPlaces];
  int length;   // key blocks attended; kPoisoned where the outputs are NaN
  bool is_end;  // no tile: there are no more

  __device__ __forceinline__ void end() {
    is_end = true;
    key_blocks = 0;
  }
};

template <class Element_, int kHeadDim_>
struct SharedListConfig : ListConfig<Element_, kHeadDim_> {
  using Base = ListConfig<Element_, kHeadDim_>;
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;

  static constexpr int kDensePadding = Base::kListPadding;

  using PublishedTile = SharedListTile;
  // Asked of the first places only.
  __device__ __forceinline__ static int key_block(const SharedListTile& tile, int place) {
    return tile.first_blocks[tile.key_blocks - 1 - place];
  }
  __device__ __forceinline__ static int kept(const SharedListTile& tile, const ConsumerBlock&) {
    return tile.length;
  }

  struct SharedStorage {
    alignas(1024) Element q[Base::kTileQ * kHeadDim];
    alignas(1024) Element k[Base::kKeyStages * Base::kBlockElements];
    alignas(1024) Element v[Base::kValueStages * Base::kBlockElements];

    SharedListTile tiles[Base::kTileSlots];
    cutlass::arch::ClusterBarrier tile_full[Base::kTileSlots];   // for the other producers
    cutlass::arch::ClusterBarrier tile_empty[Base::kTileSlots];  // from them
    cutlass::arch::ClusterTransactionBarrier q_full;
    cutlass::arch::ClusterBarrier q_empty;
    cutlass::arch::ClusterTransactionBarrier k_full[Base::kKeyStages];
    cutlass::arch::ClusterBarrier k_empty[Base::kKeyStages];
    cutlass::arch::ClusterTransactionBarrier v_full[Base::kValueStages];
    cutlass::arch::ClusterBarrier v_empty[Base::kValueStages];
    FoundBoxes found;
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

// A walk over the places of a list, whose number is a multiple of `step`, 1 or 2: an empty one where the list
// is odd and the step is not, then its blocks from the last to the first.
class Places {
 public:
  __device__ __forceinline__ Places(const AttendParams& params, const QueryTile& tile,
                                    const QueryBlock& block, int length, int step)
      : words_(find_words(params, tile, block.index)),
        visible_(length > 0 ? block.keys.visible : 0),
        word_((visible_ + kMaskBits - 1) / kMaskBits),
        bits_(0),
        begins_empty_(length % step == 1) {}

  // The next place's key block, or kNoBlock where it is empty.
  __device__ __forceinline__ int next() {
    if (begins_empty_) {
      begins_empty_ = false;
      return place::kNoBlock;
    }
    while (bits_ == 0 && word_ > 0) {
      --word_;
      bits_ = visible_word(words_, word_, visible_);
    }
    if (bits_ == 0) {
      return place::kNoBlock;
    }
    const int bit = kMaskBits - 1 - __clzll(static_cast<int64_t>(bits_));
    bits_ &= ~(uint64_t{1} << bit);
    return word_ * kMaskBits + bit;
  }

 private:
  const uint64_t* words_;
  int visible_;
  int word_;  // that bits_ are of
  uint64_t bits_;
  bool begins_empty_;
};

template <class Config>
struct SharedListProducer {
  using Storage = typename Config::SharedStorage;
  using Element = typename Config::Element;

  const AttendKernelParams& params;
  Storage& storage;

  __device__ __forceinline__ void take_all_tiles() const {
    const AttendParams& attend = params.order.attend;
    take_tiles<Config>(params, storage, [&](SharedListTile& published, const TileLength& lengths) {
      const int length = lengths.blocks[0];
      const ConsumerBlock block =
          find_listed_block(attend, published.sequence, published.first_query, length == kPoisoned);
      published.first = published.second = block;
      published.dense = true;
      published.length = length;
      published.key_blocks =
          (max(length, 0) + Config::kStepBlocks - 1) / Config::kStepBlocks * Config::kStepBlocks;
      published.full = published.key_blocks;
      Places places(attend, published, block, length, Config::kStepBlocks);
#pragma unroll 1
      for (int i = 0; i < min(published.key_blocks, SharedListTile::kFirstPlaces); ++i) {
        published.first_blocks[i] = places.next();
        published.full -= published.first_blocks[i] >= block.keys.full;
      }
    });
  }

  // One warp. Finds the blocks of the tiles that are published, ahead of the loads of K and of V, so that
  // neither waits for the mask or for a page table.
  __device__ __forceinline__ void find_boxes() const {
    const AttendParams& attend = params.order.attend;
    BoxFinder finder(storage.found, attend);
    for_each_taken_tile<Config, 32>(storage, [&](const SharedListTile& tile) BSFA_INLINE_LAMBDA {
      Places places(attend, tile, tile.first, tile.length, Config::kStepBlocks);
#pragma unroll 1
      for (int remaining = tile.key_blocks; remaining > 0; remaining -= finder.blocks()) {
        int key_block = place::kNoBlock;  // the lane's
#pragma unroll 1
        for (int i = 0; i < min(remaining, finder.blocks()); ++i) {
          const int next = places.next();
          key_block = i == finder.block() ? next : key_block;
        }
        finder.publish(find_box(attend, tile.sequence, key_block, finder.row()));
      }
    });
  }

  // A thread for K and one for V. As far ahead of the consumers as there are stages.
  // buffer_of: where a stage begins.
  template <int kStages, class BufferOf>
  __device__ __forceinline__ void load_blocks(const CUtensorMap& map,
                                              cutlass::arch::ClusterTransactionBarrier (&full)[kStages],
                                              cutlass::arch::ClusterBarrier (&empty)[kStages],
                                              Element* blocks, const BufferOf& buffer_of,
                                              int column_elements) const {
    PipelineState<kStages> state;
    PipelineState<FoundBoxes::kStages> found;
    for_each_taken_tile<Config, 1>(storage, [&](const SharedListTile& tile) BSFA_INLINE_LAMBDA {
      FoundLoads<Config> loads(storage.found, found, params.order.attend, tile.kv_head);
#pragma unroll 1
      for (int remaining = tile.key_blocks; remaining > 0; --remaining) {
        loads.find();
        const int stage = state.stage();
        wait(empty[stage], state.phase() ^ 1);
        loads.load(map, full[stage], blocks + buffer_of(stage), column_elements);
        loads.advance(remaining == 1);
        state.advance();
      }
    });
  }

  __device__ __forceinline__ void load_keys() const {
    const auto buffer_of = [](int stage) { return Config::key_buffer(stage); };
    load_blocks(params.k, storage.k_full, storage.k_empty, storage.k, buffer_of, Config::kKeyColumnElements);
  }

  __device__ __forceinline__ void load_values() const {
    const auto buffer_of = [](int stage) { return stage * Config::kBlockElements; };
    load_blocks(params.v, storage.v_full, storage.v_empty, storage.v, buffer_of, Config::kBoxElements);
  }

 private:
  // Row `row` of a block. An empty place lies beyond the tensor: the copy engine fills it with zeros and
  // reads nothing.
  __device__ __forceinline__ static PagedRow find_box(const AttendParams& attend, const Sequence& sequence,
                                                      int key_block, int row) {
    if (attend.has_pages()) {
      return find_paged_box(attend, sequence, key_block * kKeyBlock + row, key_block != place::kNoBlock);
    }
    return {key_batch(attend, sequence),
            key_block == place::kNoBlock ? attend.seqlen_k : key_row(sequence, key_block)};
  }
};

template <class Config>
__device__ __forceinline__ void consume_shared_lists(const AttendParams& params,
                                                     typename Config::SharedStorage& storage,
                                                     const ConsumerThread& who) {
  using namespace cute;
  ConsumerPipelines<Config> pipelines;
  if (who.warpgroup == 1) {
    pingpong_signal(1);  // consumer 0 goes first
  }
  const auto is_end = [&]() BSFA_INLINE_LAMBDA {
    wait(storage.q_full, pipelines.queries.phase());
    return read_flag(pipelines.published_tile(storage).is_end);
  };
#pragma unroll 1
  while (!is_end()) {
    const SharedListTile& tile = pipelines.published_tile(storage);
    if (uniform(tile.key_blocks > 0)) {
      attend_dense_tiles<Config>(storage, pipelines, params, who, INT_MAX);
    } else {
      release(storage.q_empty, who);
      pipelines.queries.advance();
      const ConsumerBlock block = tile.block_of(who.warpgroup);
      const TileContext<Config> context{storage, pipelines, params, tile, block, who};
      auto output = partition_fragment_C(typename Config::ValuesMma{}, Shape<_64, Int<Config::kHeadDim>>{});
      clear(output);
      store_results<Config>(context, output, Softmax{}, 0);
    }
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    attend_shared_kernel(const __grid_constant__ AttendKernelParams params) {
  using Storage = typename Config::SharedStorage;
  const auto initialize = [&](Storage& storage) {
    prefetch(params);
    initialize_load_barriers<Config>(storage);
    initialize_stages(storage.tile_full, storage.tile_empty, 3);  // from the loaders and the finder
    initialize_found(storage.found, 2);
  };
  const auto produce = [&](Storage& storage, int warp) BSFA_INLINE_LAMBDA {
    const SharedListProducer<Config> producer{params, storage};
    if (warp == 3) {
      producer.find_boxes();
    } else if (ptx::is_elected()) {
      if (warp == 0) {
        producer.take_all_tiles();
      } else if (warp == 1) {
        producer.load_keys();
      } else {
        producer.load_values();
      }
    }
  };
  run_roles<Config>(initialize, produce, [&](Storage& storage, const ConsumerThread& who) BSFA_INLINE_LAMBDA {
    consume_shared_lists<Config>(params.order.attend, storage, who);
  });
}

}  // namespace bsfa::sm90
