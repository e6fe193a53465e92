// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The workspace of select_blocks, on every architecture.
#pragma once

#include <cstdint>

#include "../params.hpp"

namespace bsfa {

// What the workspace holds, in this order.
struct SelectWorkspace {
  static constexpr uint64_t kAlignment = 256;
  static constexpr int kOffsetSlices = 8;  // CTAs that sample the keys of a head

  uint64_t keys;     // int8 [batch, kv_heads, seqlen_k, head_dim], packed: [kv_heads, total_k, head_dim]
  uint64_t scales;   // float [batch, kv_heads, key_tiles, 4], packed: [kv_heads, key_tiles, 4]
  uint64_t sums;     // float [batch, kv_heads, kOffsetSlices, head_dim, 2]: of sampled keys, and how many
  uint64_t offsets;  // float [batch, kv_heads, head_dim]
  uint64_t bytes;
  int32_t key_tiles;  // of two key blocks
};

inline SelectWorkspace make_select_workspace(const SelectParams& params, int head_dim) {
  const auto padded = [](uint64_t bytes) {
    return (bytes + SelectWorkspace::kAlignment - 1) / SelectWorkspace::kAlignment *
           SelectWorkspace::kAlignment;
  };
  constexpr int kTileKeys = 2 * kKeyBlock;
  const uint64_t heads = static_cast<uint64_t>(params.packs_keys() ? 1 : params.batch) * params.kv_heads;
  const uint64_t offset_rows = static_cast<uint64_t>(params.batch) * params.kv_heads;
  SelectWorkspace workspace{};
  workspace.key_tiles = params.packs_keys() ? params.seqlen_k / kTileKeys + params.batch
                                            : (params.seqlen_k + kTileKeys - 1) / kTileKeys;
  workspace.keys = 0;
  workspace.scales = padded(heads * params.seqlen_k * head_dim);
  workspace.sums = workspace.scales + padded(heads * workspace.key_tiles * 4 * sizeof(float));
  workspace.offsets =
      workspace.sums + padded(offset_rows * SelectWorkspace::kOffsetSlices * head_dim * 2 * sizeof(float));
  workspace.bytes = workspace.offsets + padded(offset_rows * head_dim * sizeof(float));
  return workspace;
}

// How many bytes of workspace a call needs. Of the pointers in `params`, only whether cu_seqlens_k is null is
// looked at.
inline uint64_t select_blocks_workspace(const SelectParams& params, int head_dim) {
  return params.precision == Precision::kInt8 ? make_select_workspace(params, head_dim).bytes : 0;
}

}  // namespace bsfa
