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

// What suits a head dimension. CTAs of an SM overlap: one's softmax, the other's GEMMs.
template <int kHeadDim>
struct Tuning;
template <>
struct Tuning<64> {
  static constexpr int kWarps = 4;
  static constexpr bool kHoldsQueries = false;
  static constexpr int kCtasPerSm = 3;
  static constexpr int kCtasPerSmRounded = 3;  // of the selection in 8 bits
};
template <>
struct Tuning<128> {
  static constexpr int kWarps = 4;
  static constexpr bool kHoldsQueries = false;
  static constexpr int kCtasPerSm = 2;
  static constexpr int kCtasPerSmRounded = 3;
};
// Half as many rows a warp, since an output of 32 would take all registers. With the queries in registers K,
// two stages, and V fill the 99 KB of the GPUs that have least.
template <>
struct Tuning<256> {
  static constexpr int kWarps = 8;
  static constexpr bool kHoldsQueries = true;
  static constexpr int kCtasPerSm = 1;
  static constexpr int kCtasPerSmRounded = 1;
};

// Whether a CTA has what it needs on compute capability 8.6 and 8.9, and so many of them on 8.0, where each
// takes 1 KB more.
template <class SharedStorage, int kCtasPerSm>
inline constexpr bool kFits =
    sizeof(SharedStorage) <= 99 * 1024 && kCtasPerSm * (sizeof(SharedStorage) + 1024) <= 164 * 1024;

// What all kernels share: the tile and how warps divide it.
template <class Element_, int kHeadDim_, int kTileQ_ = 128>
struct Config {
  using Element = Element_;
  static_assert(sizeof(Element) == 2);
  static constexpr int kHeadDim = kHeadDim_;
  using Tuned = Tuning<kHeadDim>;

  // With 32 rows a warp every fragment of K and V that is read from shared memory serves two mma.sync, which
  // makes a tile cost less shared-memory than tensor-core time. The rows of a warp are contiguous, so that in
  // geometry 64x64 a warp belongs to one sparsity block.
  static constexpr int kTileQ = kTileQ_;
  static constexpr int kTileK = kKeyBlock;
  static constexpr int kWarps = Tuned::kWarps;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kWarpRows = kTileQ / kWarps;
  static constexpr int kRowBlocks = kWarpRows / 16;   // of mma.sync m16n8k16
  static constexpr int kThreadRows = kRowBlocks * 2;  // rows that a thread has accumulators of

  // The next block's keys arrive while this one's scores are computed. A third stage would leave room for one
  // CTA on an A100.
  static constexpr int kKeyStages = 2;

  static constexpr Paging kPaging = Paging::kMaybe;

  // Whether queries lie in registers, not in shared memory.
  static constexpr bool kHoldsQueries = Tuned::kHoldsQueries;
};

// The queries in shared memory, if they are there.
template <class Config, bool kHeld = Config::kHoldsQueries>
struct SharedQueryMemory {
  alignas(1024) uint16_t q[Config::kTileQ * Config::kHeadDim];
};
template <class Config>
struct SharedQueryMemory<Config, true> {};

// Where it is known whether there are pages, fewer registers are spilled.
template <class Element_, int kHeadDim_, Paging kPaging_ = Paging::kMaybe>
struct ForwardConfig : Config<Element_, kHeadDim_> {
  using Base = Config<Element_, kHeadDim_>;
  static constexpr Paging kPaging = kPaging_;

  // 16 KB x (2 Q + 2 K + 1 V) at head dimension 128: two CTAs of an A100's 164 KB, of which each takes 1 KB
  // more.
  struct SharedStorage : SharedQueryMemory<Base> {
    alignas(1024) uint16_t k[Base::kKeyStages][Base::kTileK * Base::kHeadDim];
    alignas(1024) uint16_t v[Base::kTileK * Base::kHeadDim];
    // What every thread needs now and then lies here, not in registers.
    QueryTile tile;
    WarpsBlock blocks[2];  // the tile's; one of them unless the geometry is 64x64
    const uint16_t* keys;  // of the tile's sequence and kv head, by first_key_of()
    const uint16_t* values;
    float references[Base::kThreads];  // of the rows that vote: each thread of a quad has one of its rows

    // The epilogue's, where the queries were; or else K, of which no warp reads any more.
    __device__ __forceinline__ uint8_t* staging() {
      if constexpr (Base::kHoldsQueries) {
        static_assert(sizeof(k) >= Base::kTileQ * Base::kHeadDim * sizeof(uint16_t));
        return reinterpret_cast<uint8_t*>(k);
      } else {
        return reinterpret_cast<uint8_t*>(this->q);
      }
    }
  };

  static constexpr int kCtasPerSm = Base::Tuned::kCtasPerSm;
  static_assert(kFits<SharedStorage, kCtasPerSm>);
};

template <class Element_, int kHeadDim_>
struct BlockMaximaConfig : Config<Element_, kHeadDim_> {
  using Base = Config<Element_, kHeadDim_>;

  struct SharedStorage : SharedQueryMemory<Base> {
    alignas(1024) uint16_t k[Base::kKeyStages][Base::kTileK * Base::kHeadDim];
    float excess[2][Base::kWarps];  // of the warps' rows, in this key block and in the one before
  };

  static constexpr int kCtasPerSm = Base::Tuned::kCtasPerSm;
  static_assert(kFits<SharedStorage, kCtasPerSm>);
};

}  // namespace bsfa::sm80
