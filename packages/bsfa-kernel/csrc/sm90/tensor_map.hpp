// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// Descriptions of q, k and v for the copy engine (TMA).
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cutlass/numeric_types.h>

#include <cstdint>
#include <type_traits>

#include "../check.hpp"
#include "../common/layout.cuh"

namespace bsfa::sm90 {

// A [batch, rows, heads, columns] tensor.
struct TensorShape {
  int64_t batch;
  int64_t rows;
  int64_t heads;
  int64_t columns;
};

// cuTensorMapEncodeTiled, through the runtime, so that the library needs no libcuda to load.
inline auto encode_function() {
  static const auto function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    BSFA_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found));
#else
    BSFA_CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found));
#endif
    BSFA_CHECK_SUPPORTED(found == cudaDriverEntryPointSuccess,
                         "the sm_90 kernel needs a driver for CUDA 12.0 or later");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  return function;
}

// Boxes of box_rows x box_columns land in shared memory with the swizzle of their width, 128 or 64 bytes;
// what lies outside reads 0.
inline CUtensorMap make_tensor_map(const char* name, CUtensorMapDataType type, const void* data,
                                   const TensorShape& shape, const Strides& strides, uint32_t box_rows,
                                   uint32_t box_columns) {
  const int64_t element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 2;
  const auto bytes = [&](int64_t extent, int64_t stride) {
    return static_cast<cuuint64_t>(extent > 1 ? stride * element_bytes : shape.columns * element_bytes);
  };
  const cuuint64_t extents[4] = {static_cast<cuuint64_t>(shape.columns), static_cast<cuuint64_t>(shape.rows),
                                 static_cast<cuuint64_t>(shape.heads), static_cast<cuuint64_t>(shape.batch)};
  const cuuint64_t byte_strides[3] = {bytes(shape.rows, strides.seqlen), bytes(shape.heads, strides.heads),
                                      bytes(shape.batch, strides.batch)};
  const cuuint32_t box[4] = {box_columns, box_rows, 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const bool wide = box_columns * element_bytes == 128;
  CUtensorMap map;
  const CUresult status = encode_function()(
      &map, type, 4, const_cast<void*>(data), extents, byte_strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, wide ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    fail(BSFA_CUDA_ERROR, "cuTensorMapEncodeTiled failed for ", name, " with status ",
         static_cast<int>(status));
  }
  return map;
}

// Keys of a box where they lie in pages: as many as divide a page and, up to a sparsity block, a load.
constexpr int page_box_rows(int page_size) {
  const int power = page_size & -page_size;  // the largest power of two that divides it
  return power < kKeyBlock ? power : kKeyBlock;
}

// A box of k and v; `box_rows`, unless they lie in pages.
inline CUtensorMap make_key_map(const Problem& problem, const char* name, CUtensorMapDataType type,
                                const void* data, const Strides& strides, uint32_t box_rows,
                                uint32_t box_columns) {
  const int head_dim = problem.head_dim;
  // The copy engine knows no empty tensors. What stands in for one is never loaded.
  if (problem.seqlen_k == 0) {
    return make_tensor_map(name, type, problem.q, {1, 1, 1, head_dim}, {}, box_rows, box_columns);
  }
  if (problem.has_pages()) {
    const int page_size = problem.page_size.value;
    return make_tensor_map(name, type, data, {problem.pages, page_size, problem.kv_heads, head_dim}, strides,
                           page_box_rows(page_size), box_columns);
  }
  const int64_t batch = problem.packs_keys() ? 1 : problem.batch;
  return make_tensor_map(name, type, data, {batch, problem.seqlen_k, problem.kv_heads, head_dim}, strides,
                         box_rows, box_columns);
}

struct TensorMaps {
  CUtensorMap q, k, v;  // (column, row, head, batch); of k and v in pages (column, row, head, page)
};

template <class Element>
TensorMaps make_tensor_maps(const ForwardParams& params, uint32_t box_rows, uint32_t box_columns) {
  constexpr auto kType = std::is_same_v<Element, cutlass::half_t> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                  : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const int64_t batch = params.packs_queries() ? 1 : params.batch;
  return {make_tensor_map("q", kType, params.q, {batch, params.seqlen_q, params.heads, params.head_dim},
                          params.q_strides, box_rows, box_columns),
          make_key_map(params, "k", kType, params.k, params.k_strides, box_rows, box_columns),
          make_key_map(params, "v", kType, params.v, params.v_strides, box_rows, box_columns)};
}

}  // namespace bsfa::sm90
