// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// Attention over a block mask for GPUs since compute capability 8.0; see docs/kernel-sm80.md.
#pragma once

#include <cuda_runtime_api.h>

#include "../params.hpp"

namespace bsfa::sm80 {

// Launches attend_blocks on `stream`. Element: cutlass::half_t or cutlass::bfloat16_t; kHeadDim: 64, 128 or
// 256. Instantiated in instantiations/{half,bfloat16}_{64,128,256}_attend.cu.
template <class Element, int kHeadDim>
void attend_blocks(const AttendParams& params, cudaStream_t stream);

}  // namespace bsfa::sm80
