// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// How the warps of the sm_90a forward kernel wait for each other; docs/kernel-sm90.md has the picture.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cstdint>

#include "config.cuh"

namespace bsfa::sm90 {

// A place in a ring of stages. The phase changes with every round.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// The hardware barriers of the consumers, after those that CUTLASS keeps.
enum class NamedBarrier : uint32_t {
  kTurn0,   // consumer 0 may issue its products
  kTurn1,   // consumer 1 may
  kStage0,  // consumer 0's threads have read, or written, their staged output
  kStage1,
};

__device__ __forceinline__ void sync(NamedBarrier barrier, int offset, int threads) {
  cutlass::arch::NamedBarrier::sync(threads, static_cast<uint32_t>(barrier) + offset);
}

__device__ __forceinline__ void arrive(NamedBarrier barrier, int offset, int threads) {
  cutlass::arch::NamedBarrier::arrive(threads, static_cast<uint32_t>(barrier) + offset);
}

// Waits until the phase of an mbarrier is over. Debug builds stop a kernel that would wait for ever.
template <class Barrier>
__device__ __forceinline__ void wait(const Barrier& barrier, uint32_t phase) {
#if defined(BSFA_DEVICE_CHECK)
  for (int tries = 0; !barrier.try_wait(phase); ++tries) {
    if (tries == 1 << 22) {
      __trap();
    }
  }
#else
  barrier.wait(phase);
#endif
}

// Called by one thread, before anything else happens in the CTA.
template <class Config>
__device__ __forceinline__ void initialize_barriers(typename Config::SharedStorage& storage) {
  constexpr int kReaders = Config::kConsumerWarps;
  storage.q_full.init(1);
  storage.q_empty.init(kReaders);
  for (int stage = 0; stage < Config::kKeyStages; ++stage) {
    storage.k_full[stage].init(1);
    // The loader of V counts too: it gives the stage back when it has read the verdict.
    storage.k_empty[stage].init(kReaders + 1);
    storage.verdict_full[stage].init(kReaders);
  }
  for (int stage = 0; stage < Config::kValueStages; ++stage) {
    storage.v_full[stage].init(1);
    storage.v_empty[stage].init(kReaders);
  }
  cutlass::arch::fence_barrier_init();
}

// What the consumers decided about a key block.
struct Verdict {
  bool keep;  // this warpgroup multiplies the block's V
  bool load;  // some warpgroup does, so that V takes a stage of its ring
};

// One consumer warp's part of the verdict. All lanes must come.
template <class Config>
__device__ __forceinline__ void publish(typename Config::SharedStorage& storage,
                                        const Ring<Config::kKeyStages>& place, int warp, bool keeps) {
  const bool warp_keeps = __any_sync(0xffffffff, keeps);
  if (threadIdx.x % 32 == 0) {
    // volatile: must stay before the arrival, which the compiler takes for no access to memory.
    reinterpret_cast<volatile uint8_t*>(&storage.verdicts[place.stage])[warp] = warp_keeps;
    storage.verdict_full[place.stage].arrive();
  }
}

// The bytes of all consumer warps, those of consumer 0 in the low half.
template <class Config>
__device__ __forceinline__ uint64_t await_verdicts(typename Config::SharedStorage& storage,
                                                   const Ring<Config::kKeyStages>& place) {
  wait(storage.verdict_full[place.stage], place.phase);
  return *static_cast<volatile uint64_t*>(&storage.verdicts[place.stage]);
}

}  // namespace bsfa::sm90
