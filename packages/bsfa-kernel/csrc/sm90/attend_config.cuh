// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// What the sm_90a kernel of attend_blocks knows at compile time and keeps in shared memory.
#pragma once

#include "attend.hpp"
#include "config.cuh"

namespace bsfa::sm90 {

// A tile of 128 queries, as it is published to the consumers and to the loader.
struct ListTile : QueryTile {
  ConsumerBlock blocks[2];  // of the consumers; the same where the geometry is 128x64
  int lengths[2];           // key blocks that each attends to
  bool is_end;              // no tile: there are no more

  __device__ __forceinline__ void end() { is_end = true; }
};

// A consumer finds the key blocks of its list in two rings of places, one for K and one for V, in which the
// loaders write where a block lies. Places come in pairs; the second one of an odd list's last pair is empty,
// and names the stage of the first.
namespace place {
inline constexpr uint32_t kStageBits = 0x1f;
inline constexpr int kPhase = 5;               // bit
inline constexpr uint32_t kMasked = 1u << 16;  // some score is hidden
inline constexpr uint32_t kLast = 1u << 17;    // of the tile
inline constexpr uint32_t kEmpty = 1u << 18;
inline constexpr uint32_t kRound = 1u << 31;  // changes with every round: the place has been written
// Hidden from all queries: the last one whose keys, and the key behind them, have numbers.
inline constexpr int kNoBlock = INT32_MAX / kKeyBlock - 1;
}  // namespace place

struct Place {
  uint32_t where;
  int key_block;
};

// What both kernels have in common.
template <class Element, int kHeadDim>
struct ListConfig : ForwardConfig<Element, kHeadDim> {
  static_assert(ForwardConfig<Element, kHeadDim>::kTileQ == kAttendTileQ);

  // The loaders need more registers than the producers of the forward kernel, and the consumers need fewer.
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
};

template <class Element_, int kHeadDim_>
struct AttendConfig : ListConfig<Element_, kHeadDim_> {
  using Base = ListConfig<Element_, kHeadDim_>;
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;

  // K and V have stages of their own. Any that is free will do, so that a consumer that waits for its next
  // block does not hold up the other.
  static constexpr int kStages = kHeadDim == 128 ? 6 : 13;  // of each
  static constexpr int kPairs = 16;                         // of places; a power of two
  static constexpr int kPlaces = 2 * kPairs;
  // A pair that has not been read holds a stage at least, so that none is written over.
  static_assert(kPairs > kStages + 2);
  // Two pairs of values that a consumer holds while it waits, and one of the other's.
  static_assert(kStages >= 6);

  using SmemK = decltype(cute::tile_to_shape(
      cute::GMMA::Layout_K_SW128_Atom<Element>{},
      cute::Shape<cute::Int<kKeyBlock>, cute::Int<kHeadDim>, cute::Int<kStages>>{}));
  using SmemV = decltype(cute::tile_to_shape(
      cute::GMMA::Layout_MN_SW128_Atom<Element>{},
      cute::Shape<cute::Int<kHeadDim>, cute::Int<kKeyBlock>, cute::Int<kStages>>{},
      cute::Step<cute::_2, cute::_1, cute::_3>{}));

  struct SharedStorage {
    alignas(1024) Element q[Base::kTileQ * kHeadDim];
    // What a loader fills.
    struct Ring {
      alignas(16) Place places[Base::kConsumers][kPlaces];
      cutlass::arch::ClusterTransactionBarrier full[kStages];
      cutlass::arch::ClusterBarrier empty[kStages];
    };

    alignas(1024) Element k[kStages * Base::kBlockElements];
    alignas(1024) Element v[kStages * Base::kBlockElements];

    Ring keys;
    Ring values;
    ListTile tiles[Base::kTileSlots];
    cutlass::arch::ClusterBarrier tile_full[Base::kTileSlots];
    cutlass::arch::ClusterBarrier tile_empty[Base::kTileSlots];
    cutlass::arch::ClusterTransactionBarrier q_full;
    cutlass::arch::ClusterBarrier q_empty;
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

}  // namespace bsfa::sm90
