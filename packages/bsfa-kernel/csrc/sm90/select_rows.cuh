// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The voting rows of a consumer warp of the selection kernel: their queries, their peaks and their votes.
// Each lane of a quad votes for one of two rows in one of a tile's two key blocks.
#pragma once

#include <math_constants.h>
#include <cute/tensor.hpp>

#include <cfloat>
#include <type_traits>

#include "../common/ptx.cuh"
#include "../common/quantize.cuh"
#include "../common/select_work.cuh"
#include "select_config.cuh"

namespace bsfa::sm90 {

inline constexpr int kQuadRows = 2;
inline constexpr int kTileBlocks = 2;

struct VoterLane {
  int lane;

  __device__ __forceinline__ int row_of_quad() const { return lane / 2 % 2; }
  // Of the tile's; block 1 is visited first.
  __device__ __forceinline__ int key_block() const { return lane % 2; }
  // Rows of the warp's slot.
  __device__ __forceinline__ int row(int row_of_quad) const { return lane / 4 + 8 * row_of_quad; }
};

template <class Value>
__device__ __forceinline__ Value hidden_peak() {
  if constexpr (std::is_same_v<Value, float>) {
    return -CUDART_INF_F;
  } else {
    return INT32_MIN;
  }
}

// The largest one, and NaN where there is one.
__device__ __forceinline__ int32_t largest(int32_t a, int32_t b) {
  return max(a, b);
}
__device__ __forceinline__ int32_t largest(int32_t a, int32_t b, int32_t c) {
  return __vimax3_s32(a, b, c);
}
__device__ __forceinline__ float largest(float a, float b) {
  return ptx::max_nan(a, b);
}
__device__ __forceinline__ float largest(float a, float b, float c) {
  return largest(largest(a, b), c);
}

// The lane's peak: over the quad, of its row and key block, from each lane's peaks of both.
template <class Value>
__device__ __forceinline__ Value quad_peak(const Value (&peaks)[kQuadRows][kTileBlocks],
                                           const VoterLane& voter) {
  const bool second_row = voter.row_of_quad() == 1;
  const bool second_block = voter.key_block() == 1;
  Value row_peaks[kTileBlocks];
#pragma unroll
  for (int block = 0; block < kTileBlocks; ++block) {
    const Value mine = second_row ? peaks[1][block] : peaks[0][block];
    const Value other = second_row ? peaks[0][block] : peaks[1][block];
    row_peaks[block] = largest(mine, __shfl_xor_sync(0xffffffff, other, 2));
  }
  const Value mine = second_block ? row_peaks[1] : row_peaks[0];
  const Value other = second_block ? row_peaks[0] : row_peaks[1];
  return largest(mine, __shfl_xor_sync(0xffffffff, other, 1));
}

// The thread's peaks in the scores of one operand and key tile.
template <class Value, class Scores>
__device__ __forceinline__ void thread_peaks(const Scores& scores, Value (&peaks)[kQuadRows][kTileBlocks]) {
  constexpr int kGroups = kKeyBlock / 8;  // of 8 keys, two of which are a thread's
#pragma unroll
  for (int block = 0; block < kTileBlocks; ++block) {
#pragma unroll
    for (int row = 0; row < kQuadRows; ++row) {
      const auto score = [&](int i) { return scores(4 * (block * kGroups + i / 2) + 2 * row + i % 2); };
      Value peak = largest(score(0), score(1), score(2));
#pragma unroll
      for (int i = 3; i < 2 * kGroups - 1; i += 2) {
        peak = largest(peak, score(i), score(i + 1));
      }
      peaks[row][block] = largest(peak, score(2 * kGroups - 1));
    }
  }
}

// The same over the keys before `ends[row]`, counted from the tile's first.
template <class Value, class Scores>
__device__ __forceinline__ void thread_visible_peaks(const Scores& scores, const int (&ends)[kQuadRows],
                                                     const VoterLane& voter,
                                                     Value (&peaks)[kQuadRows][kTileBlocks]) {
  constexpr int kGroups = kKeyBlock / 8;
#pragma unroll
  for (int row = 0; row < kQuadRows; ++row) {
    const int end = ends[row] - voter.lane % 4 * 2;
#pragma unroll
    for (int block = 0; block < kTileBlocks; ++block) {
      Value peak = hidden_peak<Value>();
#pragma unroll
      for (int i = 0; i < 2 * kGroups; ++i) {
        const int group = block * kGroups + i / 2;
        const Value score = scores(4 * group + 2 * row + i % 2);
        peak = largest(peak, 8 * group + i % 2 < end ? score : hidden_peak<Value>());
      }
      peaks[row][block] = peak;
    }
  }
}

// A lane's vote on a key block, and what rebase() needs.
struct Vote {
  float excess;  // of the peak over the bound: the row keeps the block unless this is negative, which NaN is
                 // not
  float score, factor;
  float sum;     // before the vote
  bool is_high;  // the peak is so far above the base, or NaN, that rebase() must follow
};

// What a lane knows of its row. Scores are in powers of two: scale * log2(e) * q·k.
template <Rule kRule>
struct VotingRow {
  // How far above its base a row may go before it gets a new one, in powers of two.
  static constexpr float kRange = 64.0f;

  bool votes;
  float scale;      // of its peaks, times that of the key block
  float threshold;  // absolute rule: less what the row's scores lack
  // peak_lse: the reference is base + log2(sum), with a finite base. running_max: it is `base`.
  float base;
  float sum;

  // `sink`: what the reference begins with. A row that has seen NaN has a sum of NaN and a base that nothing
  // exceeds.
  __device__ __forceinline__ void reset(float sink) {
    const float seen = sink < CUDART_INF_F ? sink : CUDART_NAN_F;
    base = seen;
    sum = 0.0f;
    if constexpr (kRule == Rule::kPeakLse) {
      base = sink == -CUDART_INF_F ? -FLT_MAX : isnan(seen) ? FLT_MAX : seen;
      sum = sink == -CUDART_INF_F ? 0.0f : isnan(seen) ? seen : 1.0f;
    }
    if (kRule == Rule::kPeakLse && !votes) {
      // Scores of 0 and no bound to reach: a vote to skip without a test, except for NaN, which is
      // rebase()'s.
      scale = 0.0f;
      threshold = CUDART_INF_F;
      base = 0.0f;
      sum = 1.0f;
    }
    // Or else the compiler works it out again in every step.
    asm volatile("" : "+f"(threshold));
  }

  // What the row votes on the lane's block of the two, given its peak there. Lanes of a quad must come with
  // both blocks of a row. peak_lse: rebase() must follow where a lane of the warp says so.
  template <class Value>
  __device__ __forceinline__ Vote vote(Value peak, float key_scale, bool is_hidden, const VoterLane& voter) {
    Vote vote{0.0f, is_hidden ? -CUDART_INF_F : static_cast<float>(peak), scale * key_scale, sum, false};
    if constexpr (kRule == Rule::kPeakLse) {
      // A hidden peak is no product: its factor may be 0 or NaN.
      const float above = is_hidden ? -CUDART_INF_F : fmaf(vote.score, vote.factor, -base);
      const float mine = ptx::exp2_approx(above);
      const float other = __shfl_xor_sync(0xffffffff, mine, 1);
      // Block 0 is visited after block 1. An infinite or NaN share is rebase()'s.
      const float reference = fmaf(other, voter.key_block() == 1 ? 0.0f : 1.0f, sum);
      vote.excess = above - (ptx::log2_approx(reference) + threshold);
      vote.is_high = !(above <= kRange);  // NaN is
      sum += mine + other;
    } else {
      const float x = scaled(vote);
      float bound = threshold;
      if constexpr (kRule == Rule::kRunningMax) {
        float first, second;
        exchange(x == CUDART_INF_F ? CUDART_NAN_F : x, voter, first, second);
        const float between = ptx::max_nan(base, first);
        bound += voter.key_block() == 1 ? base : between;
        base = ptx::max_nan(between, second);
      }
      vote.excess = votes ? x - bound : -1.0f;
    }
    return vote;
  }

  // The vote and the sum once more for rows whose peak was too high, with a new base: the reference. Only for
  // these, since a row's result must not depend on its neighbours. All lanes must come.
  __device__ __forceinline__ void rebase(Vote& vote, const VoterLane& voter) {
    const bool other_is_high = __shfl_xor_sync(0xffffffff, vote.is_high, 1);
    const float x = scaled(vote);
    float first, second;
    exchange(x, voter, first, second);
    const float before = base + ptx::log2_approx(vote.sum);
    const float between = add_peak(before, first);
    const float after = add_peak(between, second);
    if (vote.is_high || other_is_high) {
      vote.excess = votes ? x - ((voter.key_block() == 1 ? before : between) + threshold) : -1.0f;
      base = !votes ? base : isnan(after) ? FLT_MAX : after;
      sum = !votes ? vote.sum : isnan(after) ? after : 1.0f;
    }
  }

 private:
  __device__ __forceinline__ static float scaled(const Vote& vote) {
    return vote.score == -CUDART_INF_F ? vote.score : vote.score * vote.factor;
  }

  // The lane's value and that of the row's other lane, in the order of visits.
  __device__ __forceinline__ static void exchange(float mine, const VoterLane& voter, float& first,
                                                  float& second) {
    const float other = __shfl_xor_sync(0xffffffff, mine, 1);
    first = voter.key_block() == 1 ? mine : other;
    second = voter.key_block() == 1 ? other : mine;
  }

  // log2(2^x + 2^y) with y a peak: NaN once one was NaN or +inf.
  __device__ __forceinline__ static float add_peak(float x, float y) {
    const float larger = ptx::max_nan(x, y);
    const float sum = larger + ptx::log2_approx(1.0f + ptx::exp2_approx(-fabsf(x - y)));
    return !(y < CUDART_INF_F) ? CUDART_NAN_F : larger == -CUDART_INF_F ? larger : sum;
  }
};

// Loads a slot's queries as the left operand of Q K^T, rounded where the config says so, and sets what the
// lane needs to know of its row.
template <class Config, Rule kRule, class Queries>
__device__ __forceinline__ void load_voters(const SelectParams& params, const RoundedKeys& rounded,
                                            const SelectTile& tile, const Slot& slot, const VoterLane& voter,
                                            Queries& queries, VotingRow<kRule>& voting_row) {
  using namespace cute;
  using Element = typename Config::Element;
  auto words = recast<uint32_t>(queries);  // of a k step: rows 0, 1 of the quad, then both with later columns
  constexpr int kSteps = decltype(size(words))::value / 4;
  const float unit = params.scale * CUDART_L2E_F;

  bool exists[kQuadRows];
  const Element* from[kQuadRows];
  CUTE_UNROLL
  for (int row = 0; row < kQuadRows; ++row) {
    const int query = slot.query(voter.row(row));
    exists[row] = slot.exists && tile.sequence.has_query(query);
    from[row] = find_row(static_cast<const Element*>(params.q), params.q_strides, tile.sequence,
                         query_row(tile.sequence, exists[row] ? query : 0), tile.head);
  }
  float sink = sink_of(params, tile.head) * CUDART_L2E_F;
  voting_row.votes = (voter.row_of_quad() == 0 ? exists[0] : exists[1]) && slot.threshold != CUDART_INF_F;
  voting_row.threshold = slot.threshold * CUDART_L2E_F;

  if constexpr (!Config::kRounded) {
    voting_row.scale = unit;
    CUTE_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = i % 2;
        const int column = step * 16 + i / 2 * 8 + voter.lane % 4 * 2;
        const bool has_column = exists[row] && column < params.head_dim;
        words(step * 4 + i) = has_column ? *reinterpret_cast<const uint32_t*>(from[row] + column) : 0;
      }
    }
  } else {
    const float* offsets = params.needs_offset_scores()
                               ? rounded.offsets_of(params, tile.sequence, tile.kv_head, Config::kHeadDim)
                               : nullptr;
    RoundedRows<Config::kHeadDim> rows;
    round_rows<Config::kHeadDim>(from, exists, params.head_dim, offsets, rows);
    CUTE_UNROLL
    for (int i = 0; i < 4 * kSteps; ++i) {
      words(i) = rows.words[i / 4][i % 4];
    }
    const auto of_lane = [&](const float (&x)[kQuadRows]) {
      return unit * (voter.row_of_quad() == 0 ? x[0] : x[1]);
    };
    voting_row.scale = of_lane(rows.scale);
    // What the row's scores lack.
    const float lack = of_lane(rows.offset_score);
    (kRule == Rule::kAbsolute ? voting_row.threshold : sink) -= lack;
  }
  voting_row.reset(sink);
}

}  // namespace bsfa::sm90
