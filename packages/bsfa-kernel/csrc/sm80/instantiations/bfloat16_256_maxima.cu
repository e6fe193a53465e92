// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

#include <cutlass/numeric_types.h>

#include "../block_maxima.cuh"

template void bsfa::sm80::block_maxima<cutlass::bfloat16_t, 256>(const BlockMaximaParams&, cudaStream_t);
