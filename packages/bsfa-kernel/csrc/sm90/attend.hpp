// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// Attention over the key blocks of a mask for compute capability 9.0 (H100, H200); see docs/kernel-attend.md.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../params.hpp"

namespace bsfa::sm90 {

// Queries of a work tile.
inline constexpr int kAttendTileQ = 128;

// The workspace holds, for every tile, how much there is to do and its place in the order of tiles.
struct TileLength {
  int32_t blocks[2];  // that each consumer attends to
};
struct OrderedTile {
  int32_t index;  // of the schedule
  TileLength length;
  int32_t unused;  // records are read 16 bytes at a time
};
inline constexpr uint64_t kAttendHeaderBytes = 256;  // the number of tiles taken

// Work tiles of a call.
inline int64_t count_attend_tiles(const AttendParams& params) {
  const int64_t rows = int64_t{params.packs_queries() ? 1 : params.batch} * params.heads;
  return rows * params.query_blocks(kAttendTileQ);
}

// Bytes of AttendParams::workspace, which must be aligned to 16. Its contents mean nothing between calls.
inline uint64_t attend_blocks_workspace(const AttendParams& params) {
  return kAttendHeaderBytes + count_attend_tiles(params) * (sizeof(OrderedTile) + sizeof(TileLength));
}

// Launches attention over the blocks of params.block_mask on `stream`. Element: cutlass::half_t or
// cutlass::bfloat16_t; kHeadDim: 64, 128 or 256. The strides of q, k and v must be multiples of 8 elements
// and every pointer aligned to 16 bytes. Instantiated in
// instantiations/{half,bfloat16}_{64,128,256}_attend.cu.
template <class Element, int kHeadDim>
void attend_blocks(const AttendParams& params, cudaStream_t stream);

}  // namespace bsfa::sm90
