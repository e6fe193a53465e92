// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// How the warps of the sm_90a forward kernel wait for each other; docs/kernel-sm90.md has the picture.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cstdint>

#include "../common/ptx.cuh"
#include "config.cuh"

namespace bsfa::sm90 {

// Where a thread is in a pipeline of stages. The phase changes with every round. A stage is found by masking
// if their number is a power of two.
template <int kStages>
struct PipelineState {
  uint32_t count = 0;  // no kernel comes to 2^32

  __device__ __forceinline__ int stage() const { return count % kStages; }
  __device__ __forceinline__ uint32_t phase() const { return count / kStages % 2; }
  __device__ __forceinline__ void advance() { ++count; }
};

// The consumers' hardware barriers, numbered after those that CUTLASS reserves.
enum class NamedBarrier : uint32_t {
  kPingPong0,  // consumer 0 may issue its GEMMs
  kPingPong1,  // consumer 1 may
  kValues0,    // consumer 0's threads have cleared what is not theirs of a block of V
  kValues1,
  kTiles,  // both consumers have reached a tile
};

__device__ __forceinline__ void sync(NamedBarrier barrier, int offset, int threads) {
  cutlass::arch::NamedBarrier::sync(threads, static_cast<uint32_t>(barrier) + offset);
}

__device__ __forceinline__ void arrive(NamedBarrier barrier, int offset, int threads) {
  cutlass::arch::NamedBarrier::arrive(threads, static_cast<uint32_t>(barrier) + offset);
}

// Ping-pong: a consumer waits until the other one has issued its GEMMs, and signals when its own are issued,
// so that one's votes and softmax overlap the other's GEMMs.
__device__ __forceinline__ void pingpong_wait(int warpgroup) {
  sync(NamedBarrier::kPingPong0, warpgroup, 256);
}

__device__ __forceinline__ void pingpong_signal(int warpgroup) {
  arrive(NamedBarrier::kPingPong0, 1 - warpgroup, 256);
}

// Between an access to memory and an mbarrier's operation, about which the compiler knows nothing.
__device__ __forceinline__ void keep_order() {
  asm volatile("" ::: "memory");
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
  keep_order();
}

// The same, given the result of an earlier test.
template <class Barrier>
__device__ __forceinline__ void wait_unless(bool over, const Barrier& barrier, uint32_t phase) {
  if (!over) {
    wait(barrier, phase);
  }
}

// Of stages that one thread fills and `readers` warps empty. This and the next two by one thread, before
// anything else happens in the CTA.
template <class FullBarrier, int kStages>
__device__ __forceinline__ void initialize_stages(FullBarrier (&full)[kStages],
                                                  cutlass::arch::ClusterBarrier (&empty)[kStages],
                                                  int readers) {
  for (int stage = 0; stage < kStages; ++stage) {
    full[stage].init(1);
    empty[stage].init(readers);
  }
}

// Of Q, K and V.
template <class Config>
__device__ __forceinline__ void initialize_load_barriers(typename Config::SharedStorage& storage) {
  constexpr int kReaders = Config::kConsumerWarps;
  storage.q_full.init(1);
  storage.q_empty.init(kReaders);
  initialize_stages(storage.k_full, storage.k_empty, kReaders);
  initialize_stages(storage.v_full, storage.v_empty, kReaders);
}

template <class Config>
__device__ __forceinline__ void initialize_barriers(typename Config::SharedStorage& storage) {
  initialize_load_barriers<Config>(storage);
  for (int stage = 0; stage < Config::kVoteStages; ++stage) {
    storage.votes_full[stage].init(Config::kConsumerWarps);
    storage.votes_empty[stage].init(1);
    storage.votes[stage] = 0;
  }
}

// A consumer warp's vote is a byte: bit 0 says whether it keeps the block; bit 1 changes with every round of
// the pipeline and shows that the vote is there, so that the consumers need no barrier to exchange votes.
inline constexpr uint32_t kKeepBits = 0x01010101;
inline constexpr uint32_t kRoundBits = 0x02020202;

template <int kStages>
__device__ __forceinline__ uint32_t round_bits(const PipelineState<kStages>& state) {
  return state.phase() == 0 ? kRoundBits : 0;  // initialize_barriers() stores 0
}

// Casts a consumer warp's vote. All lanes must call it.
template <class Config>
__device__ __forceinline__ void publish(typename Config::SharedStorage& storage,
                                        const PipelineState<Config::kVoteStages>& state, int warp,
                                        bool keeps) {
  const uint32_t warp_keeps = __any_sync(0xffffffff, keeps) ? kKeepBits : 0;
  const uint32_t votes = cute::cast_smem_ptr_to_uint(&storage.votes[state.stage()]);
  const uint32_t barrier = cute::cast_smem_ptr_to_uint(&storage.votes_full[state.stage()]);
  ptx::store_byte_and_arrive(votes + warp, warp_keeps | round_bits(state), barrier, threadIdx.x % 32 == 0);
}

// The votes of all consumer warps, those of consumer 0 in x, of consumer 1 in y. All lanes read one address,
// which tells the compiler that branches on the votes are uniform.
template <class Config>
__device__ __forceinline__ uint2 read_votes(typename Config::SharedStorage& storage,
                                            const PipelineState<Config::kVoteStages>& state) {
  const uint64_t votes = *static_cast<volatile uint64_t*>(&storage.votes[state.stage()]);
  return {static_cast<uint32_t>(votes), static_cast<uint32_t>(votes >> 32)};
}

template <int kStages>
__device__ __forceinline__ bool are_votes_there(const uint2& votes, const PipelineState<kStages>& state) {
  const uint32_t awaited = round_bits(state);
  return (((votes.x ^ awaited) | (votes.y ^ awaited)) & kRoundBits) == 0;
}

// Whether all votes are there and none keeps the block.
template <int kStages>
__device__ __forceinline__ bool do_all_skip(const uint2& votes, const PipelineState<kStages>& state) {
  const uint32_t awaited = round_bits(state);
  return ((votes.x ^ awaited) | (votes.y ^ awaited)) == 0;
}

template <class Config>
__device__ __forceinline__ uint2 await_votes(typename Config::SharedStorage& storage,
                                             const PipelineState<Config::kVoteStages>& state) {
  uint2 votes = read_votes<Config>(storage, state);
  while (!are_votes_there(votes, state)) {
    votes = read_votes<Config>(storage, state);
  }
  return votes;
}

}  // namespace bsfa::sm90
