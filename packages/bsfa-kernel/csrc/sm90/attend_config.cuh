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
};

// A place in a consumer's list of key blocks: the key block, and a word that says where it lies. Places come
// in pairs; the second of an odd list's last pair is empty, and names the stages of the first.
namespace place {
inline constexpr uint32_t kStageBits = 0x1f;
inline constexpr int kPhase = 5;               // bit
inline constexpr int kValueStage = 8;          // first bit of the same for the values
inline constexpr uint32_t kMasked = 1u << 16;  // some score is hidden
inline constexpr uint32_t kLast = 1u << 17;    // of the tile
inline constexpr uint32_t kEmpty = 1u << 18;
inline constexpr uint32_t kRound = 1u << 31;  // changes with every round: the place has been written
// Hidden from all queries: the last one whose keys have numbers.
inline constexpr int kNoBlock = INT32_MAX / kKeyBlock;
}  // namespace place

template <class Element_, int kHeadDim_>
struct AttendConfig : ForwardConfig<Element_, kHeadDim_> {
  using Base = ForwardConfig<Element_, kHeadDim_>;
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static_assert(Base::kTileQ == kAttendTileQ);

  // The loader needs more registers than the producers of the forward kernel, and the consumers need fewer.
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;

  // Stages hold blocks of K or V, whichever comes next. Any that is free will do: a consumer that waits for
  // its next block does not hold up the other.
  static constexpr int kStages = kHeadDim == 128 ? 12 : 26;
  static constexpr int kPairs = 16;  // of places; a power of two
  static constexpr int kPlaces = 2 * kPairs;
  // A pair that has not been read holds two stages at least, so that none is written over.
  static_assert(kPairs > kStages / 2 + 1);
  static_assert(kStages <= 32, "a lane of the loader for each stage");

  using SmemK = decltype(cute::tile_to_shape(
      cute::GMMA::Layout_K_SW128_Atom<Element>{},
      cute::Shape<cute::Int<kKeyBlock>, cute::Int<kHeadDim>, cute::Int<kStages>>{}));
  using SmemV = decltype(cute::tile_to_shape(
      cute::GMMA::Layout_MN_SW128_Atom<Element>{},
      cute::Shape<cute::Int<kHeadDim>, cute::Int<kKeyBlock>, cute::Int<kStages>>{},
      cute::Step<cute::_2, cute::_1, cute::_3>{}));

  struct SharedStorage {
    alignas(1024) Element q[Base::kTileQ * kHeadDim];
    alignas(1024) Element blocks[kStages * Base::kBlockElements];

    alignas(16) uint64_t places[Base::kConsumers][kPlaces];
    ListTile tiles[Base::kTileSlots];
    cutlass::arch::ClusterBarrier tile_full[Base::kTileSlots];
    cutlass::arch::ClusterBarrier tile_empty[Base::kTileSlots];
    cutlass::arch::ClusterTransactionBarrier q_full;
    cutlass::arch::ClusterBarrier q_empty;
    cutlass::arch::ClusterTransactionBarrier full[kStages];
    cutlass::arch::ClusterBarrier empty[kStages];
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

}  // namespace bsfa::sm90
