// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// Prints the dynamic shared memory of every forward kernel, "sm_<arch> <dtype> <head_dim> <bytes>" a line.
#include <cutlass/numeric_types.h>

#include <cstdio>

#include "sm80/config.cuh"
#include "sm90/config.cuh"

template <template <class, int> class Config, int kHeadDim>
void print(const char* arch) {
  std::printf("%s float16 %d %zu\n", arch, kHeadDim,
              sizeof(typename Config<cutlass::half_t, kHeadDim>::SharedStorage));
  std::printf("%s bfloat16 %d %zu\n", arch, kHeadDim,
              sizeof(typename Config<cutlass::bfloat16_t, kHeadDim>::SharedStorage));
}

int main() {
  print<bsfa::sm80::ForwardConfig, 64>("sm_80");
  print<bsfa::sm80::ForwardConfig, 128>("sm_80");
  print<bsfa::sm90::ForwardConfig, 64>("sm_90a");
  print<bsfa::sm90::ForwardConfig, 128>("sm_90a");
  return 0;
}
