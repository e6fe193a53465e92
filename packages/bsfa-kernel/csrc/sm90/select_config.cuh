// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// Every compile-time fact of the sm_90a selection kernel.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include <cstdint>
#include <type_traits>

#include "../params.hpp"

namespace bsfa::sm90 {

// What suits keys of so many bytes. A thread holds an eighth of that in registers for each operand of its
// consumer's queries, and 64 scores.
template <int kKeyBytes>
struct SelectTuning;
template <>
struct SelectTuning<64> {
  static constexpr int kOperands = 2;
  static constexpr int kStages = 8;
};
template <>
struct SelectTuning<128> {
  static constexpr int kOperands = 2;
  static constexpr int kStages = 8;
};
template <>
struct SelectTuning<256> {
  static constexpr int kOperands = 2;
  static constexpr int kStages = 4;
};
// 128 registers of queries leave room for the scores of one operand: a consumer's GEMM runs while the other
// consumer reduces.
template <>
struct SelectTuning<512> {
  static constexpr int kOperands = 1;
  static constexpr int kStages = 3;
};

// Element_: of q and k. Operand_: of the GEMM, int8_t or Element_.
template <class Element_, class Operand_, int kHeadDim_>
struct SelectConfig {
  using Element = Element_;
  using Operand = Operand_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kRounded = std::is_same_v<Operand, int8_t>;
  using Accumulator = std::conditional_t<kRounded, int32_t, float>;

  // A consumer warpgroup has one operand of 64 voting rows or two: then the GEMM of one runs while the
  // other's scores are reduced. K travels in tiles of two key blocks.
  using Tuning = SelectTuning<kHeadDim * sizeof(Operand)>;
  static constexpr int kConsumers = 2;
  static constexpr int kOperands = Tuning::kOperands;
  static constexpr int kSlots = kConsumers * kOperands * 4;  // of a tile: a warp's in each operand
  static constexpr int kConsumerWarps = kConsumers * 4;
  static constexpr int kThreads = (1 + kConsumers) * 128;
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;

  static constexpr int kTileKeys = 2 * kKeyBlock;
  static constexpr int kTileElements = kTileKeys * kHeadDim;
  static constexpr int kTileBytes = kTileElements * sizeof(Operand);
  static constexpr int kStages = Tuning::kStages;

  // The copy engine moves boxes of one swizzle's width: 128 bytes of a key, 64 where it has no more.
  static constexpr int kBoxBytes = kHeadDim * sizeof(Operand) < 128 ? 64 : 128;
  static constexpr int kBoxColumns = kBoxBytes / sizeof(Operand);
  static constexpr int kBoxes = kHeadDim / kBoxColumns;
  static constexpr int kBoxElements = kTileKeys * kBoxColumns;

  // K, (key, column, stage).
  using SmemAtom = std::conditional_t<kBoxBytes == 128, cute::GMMA::Layout_K_SW128_Atom<Operand>,
                                      cute::GMMA::Layout_K_SW64_Atom<Operand>>;
  using SmemK = decltype(cute::tile_to_shape(
      SmemAtom{}, cute::Shape<cute::Int<kTileKeys>, cute::Int<kHeadDim>, cute::Int<kStages>>{}));

  // S = Q K^T, with Q in registers.
  using Mma = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Operand, Operand, Accumulator,
                                 cute::Shape<cute::_64, cute::Int<kTileKeys>, cute::Int<kHeadDim>>>()));

  struct SharedStorage {
    alignas(1024) Operand k[kStages * kTileElements];
    alignas(16) float key_scales[kStages][4];  // of the tile's two key blocks; the rest is unused
    cutlass::arch::ClusterTransactionBarrier k_full[kStages];
    cutlass::arch::ClusterBarrier k_empty[kStages];
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
  static constexpr int kStageBytes = kTileBytes + (kRounded ? sizeof(SharedStorage::key_scales[0]) : 0);
};

}  // namespace bsfa::sm90
