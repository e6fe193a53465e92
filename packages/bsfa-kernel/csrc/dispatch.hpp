// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// Which kernels the library has, and which of them serves a call.
#pragma once

#include <bsfa/bsfa.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "params.hpp"

struct CUstream_st;

namespace bsfa {

// One compiled kernel.
template <class Params>
struct Kernel {
  int arch;  // compute capability that it was written for, times ten
  bsfa_dtype dtype;
  int head_dim;  // the largest that it serves; of smaller ones it takes the columns that lack for zeros
  void (*launch)(const Params& params, CUstream_st* stream);

  // Below this a narrower kernel would do: 64 is the narrowest that there is, and each doubles the one
  // before. So 8 to 64 run by the kernel of 64, 72 to 128 by that of 128, 136 to 256 by that of 256.
  constexpr int least_head_dim() const { return head_dim <= 64 ? kHeadDimStep : head_dim / 2 + kHeadDimStep; }
};

// Every kernel in the library; the rows come from kernels.cmake.
extern const std::initializer_list<Kernel<ForwardParams>> kForwardKernels;
extern const std::initializer_list<Kernel<BlockMaximaParams>> kBlockMaximaKernels;
extern const std::initializer_list<Kernel<SelectParams>> kSelectBlocksKernels;
extern const std::initializer_list<Kernel<AttendParams>> kAttendBlocksKernels;

// "float16" or "bfloat16".
const char* dtype_name(int dtype);

// Whether the GPU can run kernels of `arch`. Those for 90 use instructions that no other architecture has;
// those for 80 are compiled for 8.x and, where the build's options say so, for 9.0 and to PTX for all later
// ones.
bool runs_on(int arch, int capability);

struct Request {
  const char* name;  // of the kernel, for messages
  int arch;          // 0 or the one that the caller insists on
  int dtype;
  int head_dim;
};

// Throws BSFA_UNSUPPORTED where the library has no such kernel for any GPU.
template <class Params>
void check_built(const std::initializer_list<Kernel<Params>>& kernels, const Request& request);

// Bytes of workspace that serve a call whichever of the library's kernels it gets, so that no GPU need be
// asked.
template <class Params>
uint64_t workspace_bytes(const std::initializer_list<Kernel<Params>>& kernels, const Request& request,
                         const Params& params);

// The newest kernel that the GPU can run. Throws BSFA_UNSUPPORTED where there is none.
template <class Params>
const Kernel<Params>& select(const std::initializer_list<Kernel<Params>>& kernels, const Request& request,
                             int capability);

}  // namespace bsfa
