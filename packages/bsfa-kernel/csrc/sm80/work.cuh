// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// What a CTA of the forward kernel works on.
#pragma once

#include "../common/query_block.cuh"

namespace bsfa::sm80 {

// A block of queries of the tile: all of it, or in geometry 64x64 a half.
struct WarpsBlock : QueryBlock {
  int first_thread;  // of those that work on it; that one writes what follows, except last_kept
  int kept;          // number of key blocks kept, where votes are taken
  int last_kept;     // geometry 64x64: the last key block that a thread voted to keep
};

// The element (row, 0) of a sequence's rows of a head.
const __device__ __forceinline__ uint16_t* first_element(const Problem& problem, const void* tensor,
                                                         const Strides& strides, const Sequence& sequence,
                                                         int row, int head) {
  return find_row(problem, static_cast<const uint16_t*>(tensor), strides, sequence, row, head);
}

}  // namespace bsfa::sm80
