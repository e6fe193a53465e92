// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The loops over the key blocks. docs/kernel-sm80.md draws their copies and barriers on a time line.
#pragma once

#include <math_constants.h>

#include "config.cuh"
#include "softmax.cuh"
#include "tiles.cuh"
#include "work.cuh"

namespace bsfa::sm80 {

template <class Config>
class Mainloop {
 protected:
  using Scores = Accumulators<Config::kRowBlocks, Config::kTileK / 8>;
  static constexpr int kRows = Config::kThreadRows;

 public:
  Accumulators<Config::kRowBlocks, Config::kHeadDim / 8> output;
  Softmax<kRows> softmax;

  __device__ __forceinline__ Mainloop(const ForwardParams& params, typename Config::SharedStorage& storage,
                                      int half)
      : params_(params),
        storage_(storage),
        tile_(storage.tile),
        block_(storage.blocks[half]),
        keys_(storage.blocks[half].keys),
        scale_log2_(params.scale * CUDART_L2E_F) {
    output.clear();
  }

  __device__ __forceinline__ void request_queries() {
    if constexpr (Config::kHoldsQueries) {
      const uint16_t* matrix = first_query_of(params_, tile_);
      queries_.load(params_.head_dim, [&](int row) {
        const int query = this->query(row);
        return tile_.sequence.has_query(query) ? matrix + query * params_.q_strides.seqlen : nullptr;
      });
    } else {
      load_tile<Config, SharedQueries<Config>>(ptx::shared_address(storage_.q),
                                               first_query_of(params_, tile_), params_.q_strides.seqlen,
                                               tile_.first_query, tile_.sequence.seqlen_q, params_.head_dim);
    }
  }

  // Takes in the tile's key blocks [0, visible), from the last to the first: all of them, or (kVotes) those
  // that are forced or voted for, which it counts.
  template <bool kVotes>
  __device__ __forceinline__ void run(int visible) {
    const bool halved = kVotes && params_.q_block < Config::kTileQ;
    if constexpr (kVotes) {
      prepare_votes();
    }
    request_keys(visible - 1);
    request_keys(visible - 2);
    ptx::wait_for_copies<1>();
    __syncthreads();
    for (int key_block = visible - 1; key_block >= 0; --key_block) {
      Scores scores;
      float maxima[kRows];
      bool keeps = !kVotes;
      if (!kVotes || key_block < keys_.visible) {
        score(scores, key_block, key_block);
        row_maxima(scores, maxima);
        if constexpr (kVotes) {
          keeps = (key_block >= block_.undecided) | votes_to_keep(maxima);
        }
      }
      if (halved && keeps) {
        block_.last_kept = key_block;
      }
      ptx::wait_for_copies<0>();  // the next block's K, which the barrier makes everybody's
      if constexpr (kVotes) {
        if (!__syncthreads_or(keeps)) {
          request_keys(key_block - 2);
          continue;
        }
      } else {
        __syncthreads();
      }
      request_values(key_block);
      request_keys(key_block - 2);
      if (halved) {
        keeps = block_.last_kept == key_block;
      }
      if (!halved || keeps) {
        if (kVotes && threadIdx.x == block_.first_thread) {
          ++block_.kept;
        }
        exponentiate(scores, maxima);
      }
      ptx::wait_for_copies<1>();  // V
      __syncthreads();
      if (!halved || keeps) {
        multiply_values<Config>(output, scores, values_address());
      }
    }
  }

 protected:
  __device__ __forceinline__ uint32_t keys_address(int stage) const {
    return ptx::shared_address(storage_.k[stage % Config::kKeyStages]);
  }
  __device__ __forceinline__ uint32_t values_address() const {
    return ptx::shared_address(storage_.v) + SharedKeys<Config>::lane_of_left();
  }

  // A group of copies is closed even where there is nothing to copy, so that the waits count the same.
  // Where all key blocks are visited, a block's number serves as that of its stage.
  __device__ __forceinline__ void request_keys(int key_block) { request_keys(key_block, key_block); }
  __device__ __forceinline__ void request_keys(int key_block, int stage) {
    if (key_block >= 0) {
      load_keys<Config, SharedKeys<Config>>(params_, tile_.sequence, keys_address(stage), storage_.keys,
                                            params_.k_strides, key_block * Config::kTileK);
    }
    ptx::commit_copies();
  }
  __device__ __forceinline__ void request_values(int key_block) {
    load_keys<Config, SharedKeys<Config>>(params_, tile_.sequence, ptx::shared_address(storage_.v),
                                          storage_.values, params_.v_strides, key_block * Config::kTileK);
    ptx::commit_copies();
  }

  // S = Q K^T, -inf where masked.
  __device__ __forceinline__ void score(Scores& scores, int key_block, int stage) const {
    const uint32_t lane_keys = keys_address(stage) + SharedKeys<Config>::lane_of_right();
    if constexpr (Config::kHoldsQueries) {
      multiply_scores(scores, queries_, lane_keys);
    } else {
      const uint32_t lane_queries =
          ptx::shared_address(storage_.q) + SharedQueries<Config>::lane_of_left() +
          ptx::forget(threadIdx.x) / 32 * (Config::kWarpRows * SharedQueries<Config>::kRowBytes);
      multiply_scores<Config>(scores, lane_queries, lane_keys);
    }
    if (key_block >= keys_.full) {
      ptx::keep_branch();
      mask(scores, key_block);
    }
  }

  __device__ __forceinline__ void mask(Scores& scores, int key_block) const {
    const Visibility sees{tile_.sequence.seqlen_q, tile_.sequence.seqlen_k, params_.causal};
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const int end = sees.keys(query(row)) - key_block * Config::kTileK - scores.column_of_warp(0);
#pragma unroll
      for (int column = 0; column < scores.kColumns; ++column) {
        if (column / 2 * 8 + column % 2 >= end) {
          scores(row, column) = -CUDART_INF_F;
        }
      }
    }
  }

  // P = exp(S - m), O *= exp(m_old - m).
  __device__ __forceinline__ void exponentiate(Scores& scores, const float (&maxima)[kRows]) {
    float factors[kRows];
    if (softmax.raise(maxima, scale_log2_, factors)) {
      ptx::keep_branch();
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
#pragma unroll
        for (int column = 0; column < output.kColumns; ++column) {
          output(row, column) *= factors[row];
        }
      }
    }
    softmax.exponentiate(scores, scale_log2_);
  }

  // What the peaks of the thread's row, one of those that its quad shares, are compared with; +inf, which
  // is no reference, where the row does not vote. In shared memory: as a register it would make others spill.
  __device__ __forceinline__ float& reference() const { return storage_.references[threadIdx.x]; }

  __device__ __forceinline__ void prepare_votes() const {
    const bool votes = is_voter(params_, block_, tile_.sequence, query(threadIdx.x % kRows));
    reference() = votes ? RowReference::first(params_, tile_.head).value : CUDART_INF_F;
  }

  // Whether the thread's row does, whose reference then takes in the block's peak. All lanes must come.
  __device__ __forceinline__ bool votes_to_keep(const float (&maxima)[kRows]) const {
    const float peak = params_.scale * quad_row_max(maxima);
    RowReference row{reference()};
    const bool votes = row.value != CUDART_INF_F;
    const bool keeps = votes & !(row.excess(peak) < block_.threshold);
    if (params_.rule != Rule::kAbsolute && votes) {
      row.take(params_.rule, peak);
      reference() = row.value;
    }
    return keeps;
  }

  // In its sequence.
  __device__ __forceinline__ int query(int row) const {
    return tile_.first_query + threadIdx.x / 32 * Config::kWarpRows + output.row_of_warp(row);
  }

  const ForwardParams& params_;
  typename Config::SharedStorage& storage_;
  const QueryTile& tile_;
  WarpsBlock& block_;
  const KeyBlocks& keys_;
  const float scale_log2_;
  HeldQueries<Config> queries_;
};

}  // namespace bsfa::sm80
