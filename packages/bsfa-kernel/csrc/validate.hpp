// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// From the structs of the C interface to the kernels' parameters. Every rule that can be checked without a
// GPU is checked here, before the first CUDA call.
#pragma once

#include <bsfa/bsfa.h>

#include "params.hpp"

namespace bsfa {

// Throws BSFA_INVALID_ARGUMENT, with the rule and the value, where the arguments break a rule of bsfa.h.
ForwardParams validate(const bsfa_forward_args* args);
BlockMaximaParams validate(const bsfa_block_maxima_args* args);
SelectParams validate(const bsfa_select_blocks_args* args);
AttendParams validate(const bsfa_attend_blocks_args* args);

// The same without tensors and workspace, whose pointers are null in what is returned.
SelectParams validate_shape(const bsfa_select_blocks_args* args);
AttendParams validate_shape(const bsfa_attend_blocks_args* args);

// Whether the workspace that the caller gave will do.
void check_workspace(const void* workspace, uint64_t bytes, uint64_t needed);

}  // namespace bsfa
