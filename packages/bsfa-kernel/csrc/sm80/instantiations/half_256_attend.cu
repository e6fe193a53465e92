// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

#include <cutlass/numeric_types.h>

#include "../attend.cuh"

template void bsfa::sm80::attend_blocks<cutlass::half_t, 256>(const AttendParams&, cudaStream_t);
