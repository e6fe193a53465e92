// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The selection kernels for GPUs since compute capability 8.0; see docs/kernel-sm80.md.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/select_workspace.hpp"

namespace bsfa::sm80 {

// Launches the selection of key blocks on `stream`; all of the block mask is written. Element:
// cutlass::half_t or cutlass::bfloat16_t; kHeadDim: 64, 128 or 256. Instantiated in
// instantiations/{half,bfloat16}_{64,128,256}_select.cu.
template <class Element, int kHeadDim>
void select_blocks(const SelectParams& params, cudaStream_t stream);

}  // namespace bsfa::sm80
