// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// From accumulators to the output and the log-sum-exp.
#pragma once

#include <math_constants.h>

#include "../common/sink.cuh"
#include "config.cuh"
#include "softmax.cuh"
#include "tiles.cuh"
#include "work.cuh"

namespace bsfa::sm80 {

// Normalises a warp's rows and stages them in shared memory, where its queries were: no other warp reads
// those.
template <class Config, class Output, int kRows>
__device__ __forceinline__ void stage_output(const ForwardParams& params, Output& output,
                                             const Softmax<kRows>& softmax, float poison, float sink,
                                             uint8_t* staging) {
  using StagingTile = SharedTile<Config::kTileQ, Config::kHeadDim>;
  const int first_row = threadIdx.x / 32 * Config::kWarpRows;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const float sum = quad_sum(softmax.sum[row]) + poison;
    const float factor = finish_row(params.scale * softmax.maximum[row], sum, sink).factor;
#pragma unroll
    for (int chunk = 0; chunk < Config::kHeadDim / 8; ++chunk) {
      const int column = chunk * 2;
      const uint32_t place =
          StagingTile::offset(first_row + output.row_of_warp(row), chunk) + threadIdx.x % 4 * 4;
      *reinterpret_cast<uint32_t*>(staging + place) =
          pack<typename Config::Element>(output(row, column) * factor, output(row, column + 1) * factor);
    }
  }
  __syncwarp();
}

// Writes a warp's rows, 16 bytes a thread, as far as rows and columns exist.
template <class Config>
__device__ __forceinline__ void store_output(const ForwardParams& params, const QueryTile& tile,
                                             const uint8_t* staging) {
  using StagingTile = SharedTile<Config::kTileQ, Config::kHeadDim>;
  constexpr int kThreadsOfRow = Config::kHeadDim / 8;
  constexpr int kRowsOfStep = 32 / kThreadsOfRow;
  const Sequence& sequence = tile.sequence;
  const int lane = threadIdx.x % 32;
  const int chunk = lane % kThreadsOfRow;
  const int first_row = threadIdx.x / 32 * Config::kWarpRows + lane / kThreadsOfRow;
  const int first_query = tile.first_query + first_row;
  uint16_t* out = find_row(static_cast<uint16_t*>(params.out), params.out_strides, sequence,
                           query_row(sequence, first_query), tile.head) +
                  chunk * 8;
#pragma unroll
  for (int step = 0; step < Config::kWarpRows; step += kRowsOfStep) {
    const int row = first_row + step;
    if (sequence.has_query(tile.first_query + row) && chunk * 8 < params.head_dim) {
      *reinterpret_cast<uint4*>(out) =
          *reinterpret_cast<const uint4*>(staging + StagingTile::offset(row, chunk));
    }
    out += kRowsOfStep * params.out_strides.seqlen;
  }
}

template <class Config, int kRows>
__device__ __forceinline__ void store_lse(const ForwardParams& params, const QueryTile& tile,
                                          const Softmax<kRows>& softmax, float poison, float sink) {
  using Output = Accumulators<Config::kRowBlocks, Config::kHeadDim / 8>;
  float* lse = params.lse + lse_line(params, tile) * params.seqlen_q + query_row(tile.sequence, 0);
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const int query = tile.first_query + threadIdx.x / 32 * Config::kWarpRows + Output::row_of_warp(row);
    const float sum = quad_sum(softmax.sum[row]) + poison;
    if (threadIdx.x % 4 == 0 && tile.sequence.has_query(query)) {
      lse[query] = finish_row(params.scale * softmax.maximum[row], sum, sink).lse;
    }
  }
}

}  // namespace bsfa::sm80
