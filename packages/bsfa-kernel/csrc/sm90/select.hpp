// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The selection kernels for compute capability 9.0 (H100, H200); see docs/kernel-select.md.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/select_workspace.hpp"

namespace bsfa::sm90 {

// Launches the selection of key blocks on `stream`; all of the block mask is written. Element:
// cutlass::half_t or cutlass::bfloat16_t; kHeadDim: 64, 128 or 256. The strides of q and k must be multiples
// of 8 elements, their pointers aligned to 16 bytes, the workspace's to 256. Instantiated in
// instantiations/{half,bfloat16}_{64,128,256}_select.cu.
template <class Element, int kHeadDim>
void select_blocks(const SelectParams& params, cudaStream_t stream);

}  // namespace bsfa::sm90
