// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// Every compile-time fact of the sm_80 kernels.
#pragma once

#include <vector_types.h>

#include <cstdint>

#include "work.cuh"

namespace bsfa::sm80 {

// Whether a kernel finds keys and values in pages.
enum class Paging { kNever, kMaybe, kAlways };

// What all kernels share: the tile and how warps divide it.
template <class Element_, int kHeadDim_>
struct Config {
  using Element = Element_;
  static_assert(sizeof(Element) == 2);
  static constexpr int kHeadDim = kHeadDim_;
  static_assert(kHeadDim == 64 || kHeadDim == 128);

  // 32 rows a warp: every fragment of K and V that is read from shared memory serves two mma.sync, which
  // makes a tile cost less shared-memory than tensor-core time. The rows of a warp are contiguous, so that in
  // geometry 64x64 a warp belongs to one sparsity block.
  static constexpr int kTileQ = 128;
  static constexpr int kTileK = kKeyBlock;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kWarpRows = kTileQ / kWarps;
  static constexpr int kRowBlocks = kWarpRows / 16;   // of mma.sync m16n8k16
  static constexpr int kThreadRows = kRowBlocks * 2;  // rows that a thread has accumulators of

  // The next block's keys arrive while this one's scores are computed. A third stage would leave room for one
  // CTA on an A100.
  static constexpr int kKeyStages = 2;

  static constexpr Paging kPaging = Paging::kMaybe;
};

// Where it is known whether there are pages, fewer registers are spilled.
template <class Element_, int kHeadDim_, Paging kPaging_ = Paging::kMaybe>
struct ForwardConfig : Config<Element_, kHeadDim_> {
  using Base = Config<Element_, kHeadDim_>;
  static constexpr Paging kPaging = kPaging_;

  // 16 KB x (2 Q + 2 K + 1 V) at head dimension 128: two CTAs of an A100's 164 KB, of which each takes 1 KB
  // more.
  struct SharedStorage {
    alignas(1024) uint16_t q[Base::kTileQ * Base::kHeadDim];  // the epilogue's output, too
    alignas(1024) uint16_t k[Base::kKeyStages][Base::kTileK * Base::kHeadDim];
    alignas(1024) uint16_t v[Base::kTileK * Base::kHeadDim];
    // What every thread needs now and then lies here, not in registers.
    QueryTile tile;
    WarpsBlock blocks[2];  // the tile's; one of them unless the geometry is 64x64
    const uint16_t* keys;  // of the tile's sequence and kv head, by first_key_of()
    const uint16_t* values;
    float references[Base::kThreads];  // of the rows that vote: each thread of a quad has one of its four
  };

  static_assert(kHeadDim_ != 128 || 2 * (sizeof(SharedStorage) + 1024) <= 164 * 1024);

  // CTAs of an SM overlap: one's softmax, the other's GEMMs.
  static constexpr int kCtasPerSm = Base::kHeadDim == 64 ? 3 : 2;
};

template <class Element_, int kHeadDim_>
struct BlockMaximaConfig : Config<Element_, kHeadDim_> {
  using Base = Config<Element_, kHeadDim_>;

  struct SharedStorage {
    alignas(1024) uint16_t q[Base::kTileQ * Base::kHeadDim];
    alignas(1024) uint16_t k[Base::kKeyStages][Base::kTileK * Base::kHeadDim];
    float excess[2][Base::kWarps];  // of the warps' rows, in this key block and in the one before
  };

  static constexpr int kCtasPerSm = Base::kHeadDim == 64 ? 3 : 2;
};

}  // namespace bsfa::sm80
