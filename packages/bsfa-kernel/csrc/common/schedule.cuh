// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// Which query tile of which head and sequence a CTA takes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../params.hpp"

namespace bsfa {

// The order of the work. Kv heads are taken in sections whose keys and values stay in the L2 cache. In the
// last section the tiles with the most keys come first, so that the short ones fill the gaps at the end; in
// the one before it they come last, and so on, so that tiles on either side of a section's end are of one
// length. The query heads of a kv head lie side by side and read the same keys at the same time.
struct Schedule {
  int tiles;     // query tiles of a head: of one sequence, or (varlen) of all sequences
  int kv_heads;  // times the batch, unless varlen
  int group;     // query heads of a kv head
  int section;   // kv heads of a section

  // Half of an H100's L2 and most of an A100's; the other half serves the CTAs that have fallen behind.
  static constexpr int64_t kSectionBytes = int64_t{32} << 20;

  int64_t ctas() const { return int64_t{tiles} * kv_heads * group; }
};

// `bytes_of_kv_head`: the keys and values of one kv head and sequence.
inline Schedule make_schedule(int tiles, int kv_heads, int group, int64_t bytes_of_kv_head) {
  const int64_t fitting = Schedule::kSectionBytes / std::max<int64_t>(bytes_of_kv_head, 1);
  return {tiles, kv_heads, group, static_cast<int>(std::clamp<int64_t>(fitting, 1, std::max(kv_heads, 1)))};
}

struct Work {
  int tile;     // of Schedule::tiles
  int kv_head;  // of Schedule::kv_heads
  int member;   // of the group
};

__device__ __forceinline__ Work find_work(const Schedule& schedule, int cta) {
  const int ctas_of_section = schedule.section * schedule.group * schedule.tiles;
  const int section = cta / ctas_of_section;
  const int first_kv_head = section * schedule.section;
  const int in_section = cta % ctas_of_section;
  const int heads = min(schedule.section, schedule.kv_heads - first_kv_head) * schedule.group;
  const int head = in_section % heads;
  const int sections_after = (schedule.kv_heads - 1) / schedule.section - section;
  const int tile = in_section / heads;
  return {sections_after % 2 == 0 ? schedule.tiles - 1 - tile : tile, first_kv_head + head / schedule.group,
          head % schedule.group};
}

// Runs `body` for the index of each of this CTA's tiles, of `tiles` in all, in the order of the schedule.
// Every other round goes backwards through the CTAs, so that none of them gets the longest tile of every
// round.
template <class Body>
__device__ __forceinline__ void for_each_index(int tiles, Body&& body) {
  const int rounds = (tiles + gridDim.x - 1) / gridDim.x;
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    const int cta = round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    const int index = round * gridDim.x + cta;
    if (index < tiles) {
      body(index);
    }
  }
}

}  // namespace bsfa
