// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// Which keys a query sees, and which key blocks a block of queries sees (docs/semantics.md).
#pragma once

#include "../params.hpp"

namespace bsfa {

// The keys of one sequence that its queries see.
struct Visibility {
  int seqlen_q;
  int seqlen_k;
  bool causal;

  // Query `query` sees the keys [0, keys(query)).
  __device__ __forceinline__ int keys(int query) const {
    return causal ? max(0, min(query + 1 + seqlen_k - seqlen_q, seqlen_k)) : seqlen_k;
  }
};

// The key blocks of a block of queries: it sees some score of [0, visible), and every score of [0, full), so
// that [full, visible) are forced.
struct KeyBlocks {
  int visible;
  int full;
};

// Key blocks of the queries [first, first + rows) of a sequence; those that do not exist do not count.
__device__ __forceinline__ KeyBlocks key_blocks(const Visibility& sees, int first, int rows) {
  const int begin = max(first, 0);
  const int last = min(first + rows, sees.seqlen_q) - 1;
  if (last < begin) {
    return {0, 0};
  }
  return {(sees.keys(last) + kKeyBlock - 1) / kKeyBlock, sees.keys(begin) / kKeyBlock};
}

}  // namespace bsfa
