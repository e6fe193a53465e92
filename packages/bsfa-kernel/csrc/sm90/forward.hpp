// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The forward kernel for compute capability 9.0 (H100, H200); see docs/kernel-sm90.md.
#pragma once

#include <cuda_runtime_api.h>

#include "../params.hpp"

namespace bsfa::sm90 {

// Launches attention on `stream`. Element: cutlass::half_t or cutlass::bfloat16_t; kHeadDim: 64, 128 or 256.
// The strides of q, k and v must be multiples of 8 elements and every pointer aligned to 16 bytes.
// Instantiated in instantiations/{half,bfloat16}_{64,128,256}.cu.
template <class Element, int kHeadDim>
void forward(const ForwardParams& params, cudaStream_t stream);

}  // namespace bsfa::sm90
