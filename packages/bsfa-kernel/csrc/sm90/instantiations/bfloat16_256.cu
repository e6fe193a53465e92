// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

#include <cutlass/numeric_types.h>

#include "../forward.cuh"

template void bsfa::sm90::forward<cutlass::bfloat16_t, 256>(const ForwardParams&, cudaStream_t);
