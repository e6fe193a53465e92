// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

#include <cutlass/numeric_types.h>

#include "../select.cuh"

template void bsfa::sm90::select_blocks<cutlass::half_t, 256>(const SelectParams&, cudaStream_t);
