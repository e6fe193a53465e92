// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// Every compile-time fact of the sm_90a forward kernel.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include <type_traits>

#include "../params.hpp"
#include "key_pages.cuh"
#include "tuning.cuh"
#include "work.cuh"

// For lambdas that hold a step of a pass: called as a function, one would pass accumulators through memory.
#define BSFA_INLINE_LAMBDA __attribute__((always_inline))

namespace bsfa::sm90 {

// Registers move between warpgroups by setmaxnreg, which waits for ever for those that nobody gives up. A CTA
// of three warpgroups starts with 168 a thread.
template <class Config>
inline constexpr bool kRegistersFit =
    Config::kProducerRegisters + Config::kConsumers * Config::kConsumerRegisters <=
    (1 + Config::kConsumers) * 168;

template <class Element_, int kHeadDim_>
struct ForwardConfig : Tuning<kHeadDim_> {
  using Tuned = Tuning<kHeadDim_>;
  using Tuned::kKeyStages;
  using Tuned::kValueStages;
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;

  // A CTA takes 128 queries, 64 for each consumer warpgroup: one block of the geometry 128x64, two of 64x64.
  static constexpr int kTileQ = 128;
  static constexpr int kWarpgroupQ = 64;
  static constexpr int kConsumers = kTileQ / kWarpgroupQ;
  static constexpr int kConsumerWarps = kConsumers * 4;
  static constexpr int kThreads = (1 + kConsumers) * 128;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;

  // K and V travel in blocks of 64 keys, each through its own pipeline, since V is loaded for kept blocks
  // only. Whether a consumer may release a stage of V without waiting for it, which takes four stages at
  // least (docs/kernel-sm90.md, Votes).
  static constexpr bool kReleasesUnread = kValueStages >= 4;
  static constexpr int kTileSlots = 4;   // of published tiles
  static constexpr int kVoteStages = 8;  // how far the loader of V may be behind the votes

  // The copy engine moves boxes of 64 rows x 64 columns: 128 bytes a row, the width of the swizzle.
  static constexpr int kBoxColumns = 64;
  static constexpr int kBoxes = kHeadDim / kBoxColumns;
  static constexpr int kBoxElements = kKeyBlock * kBoxColumns;
  static constexpr int kBlockElements = kKeyBlock * kHeadDim;
  static constexpr int kBlockBytes = kBlockElements * sizeof(Element);
  static constexpr int kTileQBytes = kTileQ * kHeadDim * sizeof(Element);
  static_assert(kWarpgroupQ == kKeyBlock);

  // What the dense pass asks about a tile: it visits all that is visible.
  using PublishedTile = Tile;
  __device__ __forceinline__ static int key_block(const Tile&, int number) { return number; }
  __device__ __forceinline__ static int kept(const Tile&, const ConsumerBlock& block) {
    return block.keys.visible;
  }

  // Q, (query of a warpgroup, column, warpgroup).
  using SmemQ = decltype(cute::tile_to_shape(
      cute::GMMA::Layout_K_SW128_Atom<Element>{},
      cute::Shape<cute::Int<kWarpgroupQ>, cute::Int<kHeadDim>, cute::Int<kConsumers>>{}));

  // K, (key, column, stage). Where the dense pass takes pairs of blocks, the boxes of two neighbouring stages
  // interleave, so that the pair is at once a block of 128 keys: box (column / 64, stage % 2) lies at
  // kBoxElements * (2 * (column / 64) + stage % 2).
  static constexpr int kInterleaved = Tuned::kStepBlocks;                 // stages
  static constexpr int kKeyColumnElements = kInterleaved * kBoxElements;  // from box to box of a block
  __device__ __forceinline__ static int key_buffer(int stage) {
    return stage / kInterleaved * kInterleaved * kBlockElements + stage % kInterleaved * kBoxElements;
  }
  template <class Shape, class Stride>
  using Swizzled =
      cute::ComposedLayout<cute::Swizzle<3, 4, 3>, cute::smem_ptr_flag_bits<16>, cute::Layout<Shape, Stride>>;
  using KeyColumns = cute::Shape<cute::Int<kBoxColumns>, cute::Int<kBoxes>>;
  using KeyColumnStrides = cute::Stride<cute::_1, cute::Int<kKeyColumnElements>>;
  using SmemK =
      Swizzled<cute::Shape<cute::Int<kKeyBlock>, KeyColumns,
                           cute::Shape<cute::Int<kInterleaved>, cute::Int<kKeyStages / kInterleaved>>>,
               cute::Stride<cute::Int<kBoxColumns>, KeyColumnStrides,
                            cute::Stride<cute::Int<kBoxElements>, cute::Int<kInterleaved * kBlockElements>>>>;
  using SmemKPair =
      Swizzled<cute::Shape<cute::Int<2 * kKeyBlock>, KeyColumns, cute::Int<kKeyStages / 2>>,
               cute::Stride<cute::Int<kBoxColumns>, KeyColumnStrides, cute::Int<2 * kBlockElements>>>;

  // V, (column, key, stage): transposed as the GEMM needs it.
  using SmemV = decltype(cute::tile_to_shape(
      cute::GMMA::Layout_MN_SW128_Atom<Element>{},
      cute::Shape<cute::Int<kHeadDim>, cute::Int<kKeyBlock>, cute::Int<kValueStages>>{},
      cute::Step<cute::_2, cute::_1, cute::_3>{}));

  // S = Q K^T, with Q in registers: were it in shared memory, wgmma of 64 keys would take all its bandwidth.
  using ScoresMma = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float,
                                 cute::Shape<cute::_64, cute::_64, cute::Int<kHeadDim>>>()));
  // With what there are no registers for in shared memory.
  using SharedScoresMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 cute::Shape<cute::_64, cute::_64, cute::Int<kHeadDim>>>()));
  using SparseScoresMma = std::conditional_t<Tuned::kSparseQueriesInRegisters, ScoresMma, SharedScoresMma>;
  using PairScoresMma = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float,
                                 cute::Shape<cute::_64, cute::_128, cute::Int<kHeadDim>>>()));
  // O += P V, with P in registers.
  using ValuesMma = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float,
                                 cute::Shape<cute::_64, cute::Int<kHeadDim>, cute::_64>, cute::GMMA::Major::K,
                                 cute::GMMA::Major::MN>()));

  struct SharedStorage {
    alignas(1024) Element q[kTileQ * kHeadDim];
    alignas(1024) Element k[kKeyStages * kBlockElements];
    alignas(1024) Element v[kValueStages * kBlockElements];

    // Published by the producer of K. A consumer reads a slot until it has stored the tile's results; by then
    // two more tiles may have been published.
    Tile tiles[kTileSlots];
    cutlass::arch::ClusterTransactionBarrier q_full;
    cutlass::arch::ClusterBarrier q_empty;
    cutlass::arch::ClusterTransactionBarrier k_full[kKeyStages];
    cutlass::arch::ClusterBarrier k_empty[kKeyStages];
    cutlass::arch::ClusterTransactionBarrier v_full[kValueStages];
    cutlass::arch::ClusterBarrier v_empty[kValueStages];

    // The votes on a key block, a byte from each consumer warp, for the consumers and (behind a barrier) for
    // the loader of V.
    cutlass::arch::ClusterBarrier votes_full[kVoteStages];
    cutlass::arch::ClusterBarrier votes_empty[kVoteStages];
    uint64_t votes[kVoteStages];

    FoundBoxes found;  // where keys and values lie in pages
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

}  // namespace bsfa::sm90
