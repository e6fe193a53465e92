// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

#include <cutlass/numeric_types.h>

#include "../attend.cuh"

template void bsfa::sm90::attend_blocks<cutlass::bfloat16_t, 256>(const AttendParams&, cudaStream_t);
