// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// Rounding queries and keys to 8 bits (docs/semantics.md, Selection in 8 bits). Keys are rounded by two
// kernels of their own, queries as they are loaded.
#pragma once

#include <cutlass/numeric_types.h>
#include <math_constants.h>

#include <type_traits>

#include "../check.hpp"
#include "launch.cuh"
#include "layout.cuh"
#include "ptx.cuh"
#include "quad.cuh"
#include "select_workspace.hpp"

namespace bsfa {

// Where rounded keys lie: SelectWorkspace with pointers.
struct RoundedKeys {
  int8_t* keys;
  float4* scales;  // of a tile's two key blocks, in x and y
  float2* sums;
  float* offsets;
  int32_t key_tiles;

  RoundedKeys() = default;
  RoundedKeys(const SelectWorkspace& workspace, void* memory)
      : keys(static_cast<int8_t*>(memory) + workspace.keys),
        scales(reinterpret_cast<float4*>(static_cast<char*>(memory) + workspace.scales)),
        sums(reinterpret_cast<float2*>(static_cast<char*>(memory) + workspace.sums)),
        offsets(reinterpret_cast<float*>(static_cast<char*>(memory) + workspace.offsets)),
        key_tiles(workspace.key_tiles) {}

  // Those of the first key tile of a sequence and kv head.
  __device__ __forceinline__ float4* scales_of(const Problem& problem, const Sequence& sequence,
                                               int kv_head) const {
    const int first =
        problem.packs_keys() ? packed_tile(problem.cu_seqlens_k, sequence.index, 2 * kKeyBlock, 1) : 0;
    return scales + (int64_t{key_batch(problem, sequence)} * problem.kv_heads + kv_head) * key_tiles + first;
  }
  // The rounded key `key`.
  __device__ __forceinline__ int8_t* key_of(const Problem& problem, const Sequence& sequence, int kv_head,
                                            int head_dim, int key) const {
    const int64_t head = int64_t{key_batch(problem, sequence)} * problem.kv_heads + kv_head;
    return keys + (head * problem.seqlen_k + sequence.first_k + key) * head_dim;
  }
  // Of a slice of the sampled keys.
  __device__ __forceinline__ float2* sums_of(const Problem& problem, const Sequence& sequence, int kv_head,
                                             int head_dim, int slice) const {
    const int64_t row = int64_t{sequence.index} * problem.kv_heads + kv_head;
    return sums + (row * SelectWorkspace::kOffsetSlices + slice) * head_dim;
  }
  __device__ __forceinline__ float* offsets_of(const Problem& problem, const Sequence& sequence, int kv_head,
                                               int head_dim) const {
    return offsets + (int64_t{sequence.index} * problem.kv_heads + kv_head) * head_dim;
  }
};

// Two elements that lie side by side.
template <class Element>
__device__ __forceinline__ float2 to_floats(uint32_t pair) {
  if constexpr (std::is_same_v<Element, cutlass::bfloat16_t>) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000)};
  } else {
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  }
}

// What numbers are multiplied by before they are rounded, and rounded ones afterwards.
struct RoundingScale {
  float inverse;
  float scale;
};

// `largest`: the magnitude that becomes 127.
__device__ __forceinline__ RoundingScale rounding_scale(float largest) {
  constexpr float kSmallest = 0x1p-100f;
  if (!(largest < CUDART_INF_F)) {
    return {0.0f, CUDART_NAN_F};
  }
  return largest < kSmallest ? RoundingScale{0.0f, 0.0f} : RoundingScale{127.0f / largest, largest / 127.0f};
}

// Four numbers of up to 127, after multiplication, as a word of bytes. A sum with this constant has the
// rounded number in its lowest bits.
__device__ __forceinline__ uint32_t round_to_bytes(float2 a, float2 b, float inverse) {
  constexpr float kRounder = 0x1.8p23f;
  const auto bits = [&](float x) { return __float_as_uint(fmaf(x, inverse, kRounder)); };
  const uint32_t low = __byte_perm(bits(a.x), bits(a.y), 0x0040);
  const uint32_t high = __byte_perm(bits(b.x), bits(b.y), 0x0040);
  return __byte_perm(low, high, 0x5410);
}

// Two rows of queries as a thread of a quad holds them in the left operand of an 8-bit GEMM.
template <int kHeadDim>
struct RoundedRows {
  uint32_t words[kHeadDim / 32][4];  // of each k step: both rows, then both with later columns
  float scale[2];
  float offset_score[2];  // q·c with the offset c, where asked for
};

// Rounds the rows of `head_dim` elements that begin at `from`, or zeros where they do not exist. `offsets`:
// of the rows' kv head, or null.
template <int kHeadDim, class Element>
__device__ __forceinline__ void round_rows(const Element* const (&from)[2], const bool (&exists)[2],
                                           int head_dim, const float* offsets, RoundedRows<kHeadDim>& rows) {
  constexpr int kChunks = kHeadDim / 16;
  const int in_quad = threadIdx.x % 4;
  // Row by row, for the sake of registers.
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    uint2 raw[kChunks];  // four elements each
    uint32_t pair = 0;   // magnitudes of 16 bits compare as integers, and NaN above all others
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int column = i * 16 + in_quad * 4;
      raw[i] = exists[row] && column < head_dim ? *reinterpret_cast<const uint2*>(from[row] + column)
                                                : uint2{0, 0};
      pair = __vmaxu2(pair, __vmaxu2(raw[i].x & 0x7fff7fff, raw[i].y & 0x7fff7fff));
    }
    uint32_t magnitude = max(pair >> 16, pair & 0xffff);
    magnitude = max(magnitude, __shfl_xor_sync(0xffffffff, magnitude, 1));
    magnitude = max(magnitude, __shfl_xor_sync(0xffffffff, magnitude, 2));
    const RoundingScale scale = rounding_scale(to_floats<Element>(magnitude).x);
    rows.scale[row] = scale.scale;
    float offset_score = 0.0f;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const float2 low = to_floats<Element>(raw[i].x);
      const float2 high = to_floats<Element>(raw[i].y);
      rows.words[i / 2][i % 2 * 2 + row] = round_to_bytes(low, high, scale.inverse);
      if (offsets != nullptr) {
        const float4 offset = *reinterpret_cast<const float4*>(offsets + i * 16 + in_quad * 4);
        offset_score += low.x * offset.x + low.y * offset.y + high.x * offset.z + high.y * offset.w;
      }
    }
    rows.offset_score[row] = quad_sum(offset_score);
  }
}

inline constexpr int kOffsetThreads = 512;
inline constexpr int kMaxSamples = 1024;

// Sums a slice of the sampled keys of a sequence and kv head: grid (batch, kv_heads, kOffsetSlices). A thread
// sums 8 channels of some of them.
template <int kArch, class Element, int kHeadDim>
__global__ void __launch_bounds__(kOffsetThreads)
    sample_keys_kernel(const __grid_constant__ Problem problem, const __grid_constant__ RoundedKeys rounded) {
  constexpr int kChunks = kHeadDim / 8;
  constexpr int kRows = kOffsetThreads / kChunks;
  constexpr int kSamples = kMaxSamples / SelectWorkspace::kOffsetSlices;
  __shared__ float sums[kRows][kHeadDim];
  __shared__ float counts[kRows][kHeadDim];
  begin<kArch>();

  const int kv_head = blockIdx.y;
  const int slice = blockIdx.z;
  const Sequence sequence = find_sequence(problem, blockIdx.x);
  const int step = (sequence.seqlen_k + kMaxSamples - 1) / kMaxSamples;
  const int chunk = threadIdx.x % kChunks;
  const int row = threadIdx.x / kChunks;
  float sum[8] = {};
  float count[8] = {};
#pragma unroll
  for (int i = 0; i < kSamples / kRows; ++i) {
    const int64_t key = int64_t{slice * kSamples + i * kRows + row} * step;
    if (key < sequence.seqlen_k && !sequence.oversized) {
      const auto* from = find_key(problem, static_cast<const Element*>(problem.k), problem.k_strides,
                                  sequence, static_cast<int>(key), kv_head);
      const bool exists = from != nullptr && chunk * 8 < problem.head_dim;
      const uint4 raw = exists ? reinterpret_cast<const uint4*>(from)[chunk] : uint4{0, 0, 0, 0};
      const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int channel = 0; channel < 8; ++channel) {
        const float2 two = to_floats<Element>(pairs[channel / 2]);
        const float x = channel % 2 == 0 ? two.x : two.y;
        const bool counts_here = fabsf(x) < CUDART_INF_F;
        sum[channel] += counts_here ? x : 0.0f;
        count[channel] += counts_here ? 1.0f : 0.0f;
      }
    }
  }
#pragma unroll
  for (int channel = 0; channel < 8; ++channel) {
    sums[row][chunk * 8 + channel] = sum[channel];
    counts[row][chunk * 8 + channel] = count[channel];
  }
  __syncthreads();
  if (threadIdx.x < kHeadDim) {
    float2 total{0.0f, 0.0f};
    for (int i = 0; i < kRows; ++i) {
      total.x += sums[i][threadIdx.x];
      total.y += counts[i][threadIdx.x];
    }
    rounded.sums_of(problem, sequence, kv_head, kHeadDim, slice)[threadIdx.x] = total;
  }
}

inline constexpr int kRoundThreads = 256;

// Finds the offset, and rounds a tile of two key blocks, half of the threads each: grid (key_tiles * batch,
// kv_heads), packed: (key_tiles, kv_heads). The same 8 channels of all its keys fall to a thread.
template <int kArch, class Element, int kHeadDim>
__global__ void __launch_bounds__(kRoundThreads)
    round_keys_kernel(const __grid_constant__ Problem problem, const __grid_constant__ RoundedKeys rounded) {
  constexpr int kChunks = kHeadDim / 8;
  constexpr int kRows = kRoundThreads / 2 / kChunks;
  constexpr int kPasses = kKeyBlock / kRows;
  __shared__ uint32_t largest[kRoundThreads / 32];
  alignas(16) __shared__ float offsets[kHeadDim];
  begin<kArch>();

  const int kv_head = blockIdx.y;
  int index = blockIdx.x / rounded.key_tiles;
  int tile = blockIdx.x % rounded.key_tiles;
  if (problem.packs_keys()) {
    index = find_packed(problem.cu_seqlens_k, problem.batch, tile, 2 * kKeyBlock, 1);
    tile -= packed_tile(problem.cu_seqlens_k, index, 2 * kKeyBlock, 1);
  }
  const Sequence sequence = find_sequence(problem, index);
  if (tile * 2 * kKeyBlock >= sequence.seqlen_k || sequence.oversized) {
    return;
  }
  const int half = threadIdx.x / (kRoundThreads / 2);
  const int chunk = threadIdx.x % kChunks;
  const int first_key = (2 * tile + half) * kKeyBlock + threadIdx.x % (kRoundThreads / 2) / kChunks;

  uint4 raw[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int key = first_key + pass * kRows;
    raw[pass] = uint4{0, 0, 0, 0};
    if (key < sequence.seqlen_k) {
      const auto* from = find_key(problem, static_cast<const Element*>(problem.k), problem.k_strides,
                                  sequence, key, kv_head);
      if (from != nullptr && chunk * 8 < problem.head_dim) {
        raw[pass] = reinterpret_cast<const uint4*>(from)[chunk];
      }
    }
  }
  if (threadIdx.x < kHeadDim) {
    float2 total{0.0f, 0.0f};
#pragma unroll
    for (int slice = 0; slice < SelectWorkspace::kOffsetSlices; ++slice) {
      const float2 sum = rounded.sums_of(problem, sequence, kv_head, kHeadDim, slice)[threadIdx.x];
      total.x += sum.x;
      total.y += sum.y;
    }
    const float offset = total.x / fmaxf(total.y, 1.0f);
    offsets[threadIdx.x] = offset;
    if (tile == 0) {
      rounded.offsets_of(problem, sequence, kv_head, kHeadDim)[threadIdx.x] = offset;
    }
  }
  __syncthreads();
  const float4 offset0 = reinterpret_cast<const float4*>(offsets + chunk * 8)[0];
  const float4 offset1 = reinterpret_cast<const float4*>(offsets + chunk * 8)[1];
  const auto centred = [&](uint32_t pair, float x, float y) {
    const float2 two = to_floats<Element>(pair);
    return float2{two.x - x, two.y - y};
  };

  // Magnitudes compare as integers, and NaN above all others.
  uint32_t thread_largest = 0;
  const auto take = [&](float2 x) {
    thread_largest = max(thread_largest, max(__float_as_uint(fabsf(x.x)), __float_as_uint(fabsf(x.y))));
  };
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    if (first_key + pass * kRows < sequence.seqlen_k) {
      take(centred(raw[pass].x, offset0.x, offset0.y));
      take(centred(raw[pass].y, offset0.z, offset0.w));
      take(centred(raw[pass].z, offset1.x, offset1.y));
      take(centred(raw[pass].w, offset1.z, offset1.w));
    }
  }
  largest[threadIdx.x / 32] = __reduce_max_sync(0xffffffff, thread_largest);
  __syncthreads();
  uint32_t block_largest = 0;
#pragma unroll
  for (int warp = 0; warp < kRoundThreads / 64; ++warp) {
    block_largest = max(block_largest, largest[half * (kRoundThreads / 64) + warp]);
  }
  const RoundingScale scale = rounding_scale(__uint_as_float(block_largest));
  if (threadIdx.x % (kRoundThreads / 2) == 0) {
    reinterpret_cast<float*>(rounded.scales_of(problem, sequence, kv_head) + tile)[half] = scale.scale;
  }
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int key = first_key + pass * kRows;
    if (key < sequence.seqlen_k) {
      int8_t* to = rounded.key_of(problem, sequence, kv_head, kHeadDim, key);
      reinterpret_cast<uint2*>(to)[chunk] = {
          round_to_bytes(centred(raw[pass].x, offset0.x, offset0.y),
                         centred(raw[pass].y, offset0.z, offset0.w), scale.inverse),
          round_to_bytes(centred(raw[pass].z, offset1.x, offset1.y),
                         centred(raw[pass].w, offset1.z, offset1.w), scale.inverse)};
    }
  }
}

// Rounds the keys of a call that has some.
template <int kArch, class Element, int kHeadDim>
void round_keys(const Problem& problem, const RoundedKeys& rounded, cudaStream_t stream) {
  const auto kv_heads = static_cast<unsigned>(problem.kv_heads);
  const auto batch = static_cast<unsigned>(problem.batch);
  launch<kArch>(sample_keys_kernel<kArch, Element, kHeadDim>,
                dim3(batch, kv_heads, SelectWorkspace::kOffsetSlices), kOffsetThreads, 0, stream, problem,
                rounded);
  launch<kArch>(round_keys_kernel<kArch, Element, kHeadDim>,
                dim3(rounded.key_tiles * (problem.packs_keys() ? 1 : batch), kv_heads), kRoundThreads, 0,
                stream, problem, rounded);
}

}  // namespace bsfa
