// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// A consumer warpgroup: 64 queries, from the scores to the output. What sparse and dense tiles have in
// common.
#pragma once

#include <cutlass/numeric_conversion.h>
#include <cute/arch/copy_sm75.hpp>
#include <cute/tensor.hpp>

#include "barriers.cuh"
#include "config.cuh"
#include "softmax.cuh"

namespace bsfa::sm90 {

// Probabilities in 16 bits as the left operand of wgmma: its registers are in the accumulators' order.
template <class Probabilities, class Accumulators>
__device__ __forceinline__ void round_to(Probabilities& probabilities, const Accumulators& accumulators) {
  using namespace cute;
  using Element = typename Probabilities::value_type;
  using Pair = cutlass::Array<Element, 2>;
  CUTE_UNROLL
  for (int i = 0; i < size(accumulators); i += 2) {
    const cutlass::Array<float, 2> pair{accumulators(i), accumulators(i + 1)};
    const Pair rounded = cutlass::NumericArrayConverter<Element, float, 2>{}(pair);
    probabilities(i) = rounded[0];
    probabilities(i + 1) = rounded[1];
  }
}

// Issues accumulators (+)= left right. Left: registers (MMA, M, K); right: descriptors (MMA, N, K).
template <bool kAccumulate, class Mma, class Left, class Right, class Accumulators>
__device__ __forceinline__ void multiply(Mma& mma, const Left& left, const Right& right,
                                         Accumulators& accumulators) {
  using namespace cute;
  mma.accumulate_ = kAccumulate ? GMMA::ScaleOut::One : GMMA::ScaleOut::Zero;
  CUTE_UNROLL
  for (int k = 0; k < size<2>(left); ++k) {
    gemm(mma, left(_, _, k), right(_, _, k), accumulators);
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
}

// Starts that GEMM, which then runs beside what follows.
template <bool kAccumulate, class Mma, class Left, class Right, class Accumulators>
__device__ __forceinline__ void start_gemm(Mma& mma, Left& left, const Right& right,
                                           Accumulators& accumulators) {
  using namespace cute;
  warpgroup_fence_operand(left);
  warpgroup_fence_operand(accumulators);
  warpgroup_arrive();
  multiply<kAccumulate>(mma, left, right, accumulators);
  warpgroup_commit_batch();
  warpgroup_fence_operand(accumulators);
}

// Waits until no more than kPending GEMMs run; the finished one wrote `accumulators`.
template <int kPending, class Accumulators>
__device__ __forceinline__ void finish_gemm(Accumulators& accumulators) {
  cute::warpgroup_wait<kPending>();
  cute::warpgroup_fence_operand(accumulators);
}

// A value that is the same in all lanes, in a form in which the compiler sees that it is: branches on it then
// need no care for threads that part.
__device__ __forceinline__ int uniform(int value) {
  return __shfl_sync(0xffffffff, value, 0);
}
__device__ __forceinline__ bool uniform(bool value) {
  return __any_sync(0xffffffff, value);
}

// A flag in shared memory. That all lanes read one address tells the compiler that they do the same, even
// where a loop ends by it, which it does not see of uniform().
__device__ __forceinline__ bool read_flag(const bool& flag) {
  return *static_cast<const volatile bool*>(&flag);
}

// Who a thread is among the consumers, and which rows and columns of its warpgroup's tile it has.
struct ConsumerThread {
  int warpgroup;  // 0 or 1
  int thread;     // in the warpgroup

  __device__ __forceinline__ int warp() const { return warpgroup * 4 + thread / 32; }
  __device__ __forceinline__ int row(int i) const { return thread / 32 * 16 + thread % 32 / 4 + 8 * i; }
  // Of a matrix's column i: the pairs of a row's columns go round the four threads of a quad.
  __device__ __forceinline__ int column(int i) const { return thread % 4 * 2 + i % 2 + i / 2 * 8; }
};

// One arrival for each warp: a stage is free when all warps are done with it.
__device__ __forceinline__ void release(cutlass::arch::ClusterBarrier& empty, const ConsumerThread& who) {
  if (who.thread % 32 == 0) {
    empty.arrive();
  }
}

// The same without a branch, for the sparse pass, where each one counts. In the dense pass ptxas would put
// all multiplications in front of the exponentials (seen at head_dim 64).
__device__ __forceinline__ void release_branchless(cutlass::arch::ClusterBarrier& empty,
                                                   const ConsumerThread& who) {
  ptx::arrive(cute::cast_smem_ptr_to_uint(&empty), who.thread % 32 == 0);
}

// Hides the keys [keys[row], ...) in scores whose first column is key `first_key`.
template <class Matrix>
__device__ __forceinline__ void mask_scores(Matrix& scores, const ConsumerThread& who,
                                            const int (&keys)[kThreadRows], int first_key) {
  using namespace cute;
  CUTE_UNROLL
  for (int row = 0; row < kThreadRows; ++row) {
    CUTE_UNROLL
    for (int column = 0; column < size<1>(scores); ++column) {
      if (first_key + who.column(column) >= keys[row]) {
        scores(row, column) = -CUDART_INF_F;
      }
    }
  }
}

// Whether each row of the warp sees all keys of a block; `keys[row]` is how many the row sees in all.
__device__ __forceinline__ bool sees_all(const int (&keys)[kThreadRows], int first_key) {
  return !__any_sync(0xffffffff, min(keys[0], keys[1]) < first_key + kKeyBlock);
}

// Behind a sequence's last key a block of V can hold what is not the sequence's: the next one's values, or
// what happens to be in a page. That may be NaN, which weights of 0 do not hide. Needs a full stage,
// `values`, and all threads of the warpgroup.
template <class Config>
__device__ __forceinline__ void clear_foreign_values(const ForwardParams& params, const Sequence& sequence,
                                                     const ConsumerThread& who,
                                                     typename Config::Element* values, int key_block) {
  const int first_row = sequence.seqlen_k - key_block * kKeyBlock;
  if (!params.has_foreign_keys() || first_row >= kKeyBlock) {
    return;
  }
  using Chunk = uint4;
  constexpr int kRowChunks = Config::kBoxColumns * sizeof(typename Config::Element) / sizeof(Chunk);
  for (int box = 0; box < Config::kBoxes; ++box) {
    auto* chunks = reinterpret_cast<Chunk*>(values + box * Config::kBoxElements);
    for (int i = max(first_row, 0) * kRowChunks + who.thread; i < kKeyBlock * kRowChunks; i += 128) {
      chunks[i] = Chunk{0, 0, 0, 0};
    }
  }
  cutlass::arch::fence_view_async_shared();
  sync(NamedBarrier::kValues0, who.warpgroup, 128);
}

// What a consumer takes along from tile to tile.
template <class Config>
struct ConsumerPipelines {
  PipelineState<Config::kKeyStages> keys;
  PipelineState<Config::kVoteStages> votes;  // moves with sparse tiles only
  PipelineState<Config::kValueStages> values;
  PipelineState<1> queries;

  // The tile whose queries come next.
  const __device__ __forceinline__ typename Config::PublishedTile& published_tile(
      const typename Config::SharedStorage& storage) const {
    return storage.tiles[queries.count % Config::kTileSlots];
  }
};

// What the passes over a tile's key blocks work on.
template <class Config>
struct TileContext {
  typename Config::SharedStorage& storage;
  ConsumerPipelines<Config>& pipelines;
  const ForwardParams& params;
  const Tile& tile;
  const ConsumerBlock& block;
  const ConsumerThread who;

  __device__ __forceinline__ void clear_foreign_values(int stage, int key_block) const {
    bsfa::sm90::clear_foreign_values<Config>(params, tile.sequence, who,
                                             storage.v + stage * Config::kBlockElements, key_block);
  }
  __device__ __forceinline__ int first_query() const {
    return tile.first_query + who.warpgroup * Config::kWarpgroupQ;
  }
  // Number of keys that the thread's rows see.
  __device__ __forceinline__ void visible_keys(int (&keys)[kThreadRows]) const {
    const Visibility sees{tile.sequence.seqlen_q, tile.sequence.seqlen_k, params.causal};
    CUTE_UNROLL
    for (int row = 0; row < kThreadRows; ++row) {
      keys[row] = sees.keys(first_query() + who.row(row));
    }
  }
};

// Registers for the warpgroup's queries as the left operand of Q K^T.
template <class Config, class Mma>
__device__ __forceinline__ auto queries_fragment(const Mma& mma) {
  using namespace cute;
  using Queries = decltype(typename Config::SmemQ{}(_, _, 0));
  return mma.get_slice(0).partition_fragment_A(
      make_tensor(make_smem_ptr(static_cast<typename Config::Element*>(nullptr)), Queries{}));
}

// Fills them, and gives the queries' place in shared memory back.
template <class Config, class Mma, class Queries>
__device__ __forceinline__ void load_queries(typename Config::SharedStorage& storage,
                                             const ConsumerThread& who, const Mma& mma, Queries& queries) {
  using namespace cute;
  using Element = typename Config::Element;
  const auto smem_q = make_tensor(make_smem_ptr(storage.q), typename Config::SmemQ{})(_, _, who.warpgroup);
  const auto copy_q = make_tiled_copy_A(Copy_Atom<SM75_U32x4_LDSM_N, Element>{}, mma);
  const auto copy_slice = copy_q.get_thread_slice(who.thread);
  auto to = copy_slice.retile_D(queries);
  copy(copy_q, copy_slice.partition_S(smem_q), to);
  release(storage.q_empty, who);
}

}  // namespace bsfa::sm90
