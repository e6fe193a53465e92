// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// Tiles in shared memory and in accumulators, and the two GEMMs of attention on them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cutlass/numeric_types.h>
#include <cute/arch/mma_sm80.hpp>

#include <climits>
#include <cstdint>
#include <type_traits>

#include "../common/layout.cuh"
#include "../common/ptx.cuh"

namespace bsfa::sm80 {

// A tile of 16-bit elements in shared memory, [kRows, kColumns], as panels of 64 columns. A row of a panel is
// 128 bytes; its eight 16-byte chunks are permuted by row % 8, so that neither ldmatrix nor cp.async meets a
// bank conflict. As the permutation is an exclusive or, and tiles are aligned to 1024 bytes, every address
// that a lane reads follows from one register and constants (`at`): registers are what the kernel is short
// of.
template <int kRows_, int kColumns>
struct SharedTile {
  static_assert(kColumns % 64 == 0);
  static constexpr int kRows = kRows_;
  static constexpr int kRowBytes = 128;
  static constexpr int kPanelBytes = kRows * kRowBytes;

  // Byte offset of the 16-byte chunk `chunk` of row `row`.
  __device__ __forceinline__ static uint32_t offset(int row, int chunk) {
    return chunk / 8 * kPanelBytes + row * kRowBytes + ((chunk ^ row) % 8) * 16;
  }

  // What a lane adds to the address of a 16x16 block for ldmatrix.x4 to give its four 8x8 matrices in the
  // order of a left operand, (row, column) = (0, 0), (8, 0), (0, 8), (8, 8); transposed, they are two right
  // operands.
  __device__ __forceinline__ static uint32_t lane_of_left() {
    const int lane = threadIdx.x % 32;
    return offset(lane % 16, lane / 16);
  }

  // The same for two right operands, which want the two matrices of 8 rows side by side: (0, 0), (0, 8), (8,
  // 0), (8, 8).
  __device__ __forceinline__ static uint32_t lane_of_right() {
    const int lane = threadIdx.x % 32;
    return offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }

  // From the lane's address in the block at (0, 0) to that at (16 * row_block, 16 * column_block).
  __device__ __forceinline__ static uint32_t at(uint32_t address, int row_block, int column_block) {
    return (address ^ (column_block % 4 * 32)) + column_block / 4 * kPanelBytes + row_block * 16 * kRowBytes;
  }
};

// A thread's part of a warp's accumulators: kRowBlocks x kColumnBlocks results of mma.sync m16n8. The thread
// has two rows and two columns of each.
template <int kRowBlocks, int kColumnBlocks, class Value = float>
struct Accumulators {
  static constexpr int kRows = kRowBlocks * 2;
  static constexpr int kColumns = kColumnBlocks * 2;
  Value block[kRowBlocks][kColumnBlocks][4];

  __device__ __forceinline__ Value& operator()(int row, int column) {
    return block[row / 2][column / 2][row % 2 * 2 + column % 2];
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        (*this)(row, column) = 0;
      }
    }
  }

  // Which row of the warp's, and which column, the thread's `row` and `column` are.
  __device__ __forceinline__ static int row_of_warp(int row) { return threadIdx.x % 32 / 4 + row * 8; }
  __device__ __forceinline__ static int column_of_warp(int column) {
    return threadIdx.x % 4 * 2 + column / 2 * 8 + column % 2;
  }
};

template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<Element, cutlass::half_t>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

// sums (16 x 8) += left (16 x 16) * right^T (8 x 16).
template <class Element>
__device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&left)[4], uint32_t right_low,
                                         uint32_t right_high) {
  using Op = std::conditional_t<std::is_same_v<Element, cutlass::half_t>, cute::SM80_16x8x16_F32F16F16F32_TN,
                                cute::SM80_16x8x16_F32BF16BF16F32_TN>;
  Op::fma(sums[0], sums[1], sums[2], sums[3], left[0], left[1], left[2], left[3], right_low, right_high,
          sums[0], sums[1], sums[2], sums[3]);
}

template <class Config>
using SharedQueries = SharedTile<Config::kTileQ, Config::kHeadDim>;
template <class Config>
using SharedKeys = SharedTile<Config::kTileK, Config::kHeadDim>;

// 16 columns of a warp's queries, as the left operand.
template <class Config>
using QueryFragment = uint32_t[Config::kRowBlocks][4];

// A warp's queries in registers, where the config says so.
template <class Config, bool kHolds = Config::kHoldsQueries>
struct HeldQueries {};
template <class Config>
struct HeldQueries<Config, true> {
  QueryFragment<Config> fragments[Config::kHeadDim / 16];

  // `row_at(row)`: where the row that the thread's accumulators have as `row` begins; null makes zeros, as do
  // columns from `head_dim` on.
  template <class RowAt>
  __device__ __forceinline__ void load(int head_dim, const RowAt& row_at) {
#pragma unroll
    for (int row = 0; row < Config::kThreadRows; ++row) {
      const uint16_t* from = row_at(row);
#pragma unroll
      for (int i = 0; i < Config::kHeadDim / 8; ++i) {
        const int column = i * 8 + threadIdx.x % 4 * 2;
        fragments[i / 2][row / 2][i % 2 * 2 + row % 2] =
            from != nullptr && column < head_dim ? *reinterpret_cast<const uint32_t*>(from + column) : 0;
      }
    }
  }
};

// scores += queries * keys^T, of 16 columns.
template <class Config, class Scores>
__device__ __forceinline__ void multiply_fragment(Scores& scores, const QueryFragment<Config>& queries,
                                                  uint32_t lane_keys, int step) {
#pragma unroll
  for (int column = 0; column < Config::kTileK / 16; ++column) {
    uint32_t keys[4];
    ptx::load_matrices(keys, SharedKeys<Config>::at(lane_keys, column, step));
#pragma unroll
    for (int row = 0; row < Config::kRowBlocks; ++row) {
      multiply<typename Config::Element>(scores.block[row][2 * column], queries[row], keys[0], keys[1]);
      multiply<typename Config::Element>(scores.block[row][2 * column + 1], queries[row], keys[2], keys[3]);
    }
  }
}

// scores = queries * keys^T: a warp's rows of the tile of queries, and all of the tile of keys.
template <class Config, class Scores>
__device__ __forceinline__ void multiply_scores(Scores& scores, const HeldQueries<Config>& queries,
                                                uint32_t lane_keys) {
  scores.clear();
#pragma unroll
  for (int step = 0; step < Config::kHeadDim / 16; ++step) {
    multiply_fragment<Config>(scores, queries.fragments[step], lane_keys, step);
  }
}

// The lane's address in its warp's rows of the queries in shared memory.
template <class Config>
__device__ __forceinline__ uint32_t shared_queries_of_warp(const uint16_t* queries) {
  using Tile = SharedQueries<Config>;
  return ptx::shared_address(queries) + Tile::lane_of_left() +
         threadIdx.x / 32 * (Config::kWarpRows * Tile::kRowBytes);
}

// The same with the queries in shared memory.
template <class Config, class Scores>
__device__ __forceinline__ void multiply_scores(Scores& scores, uint32_t lane_queries, uint32_t lane_keys) {
  scores.clear();
#pragma unroll 4
  for (int step = 0; step < Config::kHeadDim / 16; ++step) {
    QueryFragment<Config> queries;
#pragma unroll
    for (int row = 0; row < Config::kRowBlocks; ++row) {
      ptx::load_matrices(queries[row], SharedQueries<Config>::at(lane_queries, row, step));
    }
    multiply_fragment<Config>(scores, queries, lane_keys, step);
  }
}

// output += weights * values; the weights are rounded to 16 bits.
template <class Config, class Output, class Weights>
__device__ __forceinline__ void multiply_values(Output& output, const Weights& weights,
                                                uint32_t lane_values) {
  using Element = typename Config::Element;
  using ValueTile = SharedTile<Config::kTileK, Config::kHeadDim>;
#pragma unroll
  for (int step = 0; step < Config::kTileK / 16; ++step) {
    uint32_t left[Config::kRowBlocks][4];
#pragma unroll
    for (int row = 0; row < Config::kRowBlocks; ++row) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const float (&from)[4] = weights.block[row][2 * step + part / 2];
        left[row][part] = pack<Element>(from[part % 2 * 2], from[part % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int column = 0; column < Config::kHeadDim / 16; ++column) {
      uint32_t values[4];
      ptx::load_matrices_transposed(values, ValueTile::at(lane_values, step, column));
#pragma unroll
      for (int row = 0; row < Config::kRowBlocks; ++row) {
        multiply<Element>(output.block[row][2 * column], left[row], values[0], values[1]);
        multiply<Element>(output.block[row][2 * column + 1], left[row], values[2], values[3]);
      }
    }
  }
}

// Starts the copy of the rows [first, first + rows of Tile) of a [seqlen, head_dim] matrix in global memory
// to the tile at `shared`, with all threads of the CTA; rows outside [0, end) and columns from `head_dim` on
// become 0. The stride is that of a row, in elements.
template <class Config, class Tile>
__device__ __forceinline__ void load_tile(uint32_t shared, const uint16_t* matrix, const int64_t& stride,
                                          int first, int end, int head_dim) {
  constexpr int kThreadsOfRow = Config::kHeadDim / 8;
  constexpr int kRowsOfStep = Config::kThreads / kThreadsOfRow;
  static_assert(kRowsOfStep % 8 == 0);  // a thread stays at one place of the permutation
  const int thread = ptx::forget(threadIdx.x);
  const int row = thread / kThreadsOfRow;
  const int chunk = thread % kThreadsOfRow;
  const uint32_t target = shared + Tile::offset(row, chunk);
  const uint16_t* source = matrix + (first + row) * stride + chunk * 8;
  if (first >= 0 && first + Tile::kRows <= end && head_dim == Config::kHeadDim) {
    ptx::keep_branch();
#pragma unroll
    for (int step = 0; step < Tile::kRows; step += kRowsOfStep) {
      ptx::copy_async(target + step * Tile::kRowBytes, source + step * stride);
    }
  } else {
    const unsigned rows = chunk * 8 < head_dim ? end : 0;
#pragma unroll
    for (int step = 0; step < Tile::kRows; step += kRowsOfStep) {
      ptx::copy_async_or_zero(target + step * Tile::kRowBytes, source + step * stride,
                              static_cast<unsigned>(first + row + step) < rows);
    }
  }
}

// The same for the keys of a sequence, which may lie in pages. `matrix`: as first_key_of() finds it.
template <class Config, class Tile>
__device__ __forceinline__ void load_keys(const Problem& problem, const Sequence& sequence, uint32_t shared,
                                          const uint16_t* matrix, const Strides& strides, int first) {
  if (Config::kPaging == Paging::kNever || (Config::kPaging == Paging::kMaybe && !problem.has_pages())) {
    load_tile<Config, Tile>(shared, matrix, strides.seqlen, first, sequence.seqlen_k, problem.head_dim);
    return;
  }
  ptx::keep_branch();
  constexpr int kThreadsOfRow = Config::kHeadDim / 8;
  constexpr int kRowsOfStep = Config::kThreads / kThreadsOfRow;
  const PageTable pages = page_table(problem, sequence);
  const int thread = ptx::forget(threadIdx.x);
  const int row = thread / kThreadsOfRow;
  const int chunk = thread % kThreadsOfRow;
  const uint32_t target = shared + Tile::offset(row, chunk);
  const int first_key = chunk * 8 < problem.head_dim ? first + row : INT_MAX - Tile::kRows;
#pragma unroll 1
  for (int step = 0; step < Tile::kRows; step += kRowsOfStep) {
    const int key = first_key + step;
    const uint16_t* source = matrix;
    bool exists = key < sequence.seqlen_k;
    if (exists) {
      const PagedRow place = pages.find(key);
      exists = static_cast<unsigned>(place.page) < static_cast<unsigned>(problem.pages);
      source += place.page * strides.batch + place.row * strides.seqlen + chunk * 8;
    }
    ptx::copy_async_or_zero(target + step * Tile::kRowBytes, source, exists);
  }
}

}  // namespace bsfa::sm80
