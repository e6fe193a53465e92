// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// How the sm_90a kernels of forward and attend_blocks use registers and shared memory at each head_dim. Most
// of it was found by measuring (docs/lab/sm90.md).
#pragma once

namespace bsfa::sm90 {

template <int kHeadDim>
struct Tuning;

template <>
struct Tuning<64> {
  // Key blocks that a step of the dense pass takes: two, which share a wgmma, or one.
  static constexpr int kStepBlocks = 2;
  // Key blocks whose scores the sparse pass has in registers.
  static constexpr int kScoresInHand = 3;
  // Columns of Q that the dense pass keeps in registers, and whether the sparse pass keeps all there; wgmma
  // reads the others from shared memory each time.
  static constexpr int kDenseRegisterColumns = 64;
  static constexpr bool kSparseQueriesInRegisters = true;
  // Blocks of K and V in shared memory.
  static constexpr int kKeyStages = 8;
  static constexpr int kValueStages = 8;
  static constexpr int kListStages = 13;  // of each, where the consumers have lists of their own
  // Shorter code at the start of dense tiles and at the end of all; it makes this dense loop slower.
  static constexpr bool kShortEnds = false;
  // No-ops in front of the dense pass, in the forward kernel and in that of lists, which put its loop where
  // it runs fastest: at 32 or 48 modulo 128 bytes; at head_dim 128, in the forward kernel, at 0.
  static constexpr int kDensePadding = 8;
  static constexpr int kListPadding = 4;
};

template <>
struct Tuning<128> {
  static constexpr int kStepBlocks = 2;
  static constexpr int kScoresInHand = 3;
  static constexpr int kDenseRegisterColumns = 128;
  static constexpr bool kSparseQueriesInRegisters = true;
  static constexpr int kKeyStages = 8;
  static constexpr int kValueStages = 4;
  static constexpr int kListStages = 6;
  static constexpr bool kShortEnds = true;
  static constexpr int kDensePadding = 5;
  static constexpr int kListPadding = 0;
};

// The output takes 128 registers of a thread, Q half of what other kernels have for K and V.
template <>
struct Tuning<256> {
  static constexpr int kStepBlocks = 1;
  static constexpr int kScoresInHand = 2;
  static constexpr int kDenseRegisterColumns = 64;
  static constexpr bool kSparseQueriesInRegisters = false;
  static constexpr int kKeyStages = 2;
  static constexpr int kValueStages = 2;
  static constexpr bool kShortEnds = true;
  static constexpr int kDensePadding = 0;
  static constexpr int kListPadding = 0;
};

}  // namespace bsfa::sm90
