// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// What a CTA of the forward kernel works on.
#pragma once

#include "../common/launch.cuh"
#include "../common/query_block.cuh"

namespace bsfa::sm80 {

// A block of queries of the tile: all of it, or in geometry 64x64 a half.
struct WarpsBlock : QueryBlock {
  int first_thread;  // of those that work on it; that one writes what follows, except last_kept
  int kept;          // number of key blocks kept, where votes are taken
  int last_kept;     // geometry 64x64: the last key block that a thread voted to keep
};

// The element (0, 0) of a sequence's queries of a head.
const __device__ __forceinline__ uint16_t* first_query_of(const Problem& problem, const QueryTile& tile) {
  return find_row(static_cast<const uint16_t*>(problem.q), problem.q_strides, tile.sequence,
                  query_row(tile.sequence, 0), tile.head);
}

// Where a sequence's rows of a kv head begin in k or v: at key 0, or in page 0.
const __device__ __forceinline__ uint16_t* first_key_of(const Problem& problem, const void* tensor,
                                                        const Strides& strides, const QueryTile& tile) {
  const auto* data = static_cast<const uint16_t*>(tensor);
  return problem.has_pages()
             ? data + tile.kv_head * strides.heads
             : find_row(data, strides, tile.sequence, key_row(tile.sequence, 0), tile.kv_head);
}

// Launches a kernel with a CTA for every tile. key_bytes: what a tile reads of each key.
template <class Config, class Params>
void launch_over_tiles(void (*kernel)(Params, Schedule), const Params& params, int key_bytes,
                       cudaStream_t stream) {
  const Schedule schedule = make_schedule(params, params.query_blocks(Config::kTileQ), key_bytes);
  launch<80>(kernel, dim3(static_cast<unsigned>(schedule.ctas())), Config::kThreads,
             sizeof(typename Config::SharedStorage), stream, params, schedule);
}

}  // namespace bsfa::sm80
