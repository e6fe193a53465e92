// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// Prints the dynamic shared memory of every kernel that has some, "sm_<arch> <kernel> <dtype> <head_dim>
// <CTAs of an SM> <bytes>" a line.
#include <cutlass/numeric_types.h>

#include <cstdio>

#include "sm80/config.cuh"
#include "sm90/attend_config.cuh"
#include "sm90/config.cuh"
#include "sm90/select_config.cuh"

template <class Config>
void print(const char* arch, const char* kernel, const char* dtype, int ctas_per_sm = 1) {
  std::printf("%s %s %s %d %d %zu\n", arch, kernel, dtype, Config::kHeadDim, ctas_per_sm,
              sizeof(typename Config::SharedStorage));
}

template <class Element, int kHeadDim>
void print_all(const char* dtype) {
  using Forward80 = bsfa::sm80::ForwardConfig<Element, kHeadDim>;
  using Maxima80 = bsfa::sm80::BlockMaximaConfig<Element, kHeadDim>;
  print<Forward80>("sm_80", "forward", dtype, Forward80::kCtasPerSm);
  print<Maxima80>("sm_80", "block_maxima", dtype, Maxima80::kCtasPerSm);
  print<bsfa::sm90::ForwardConfig<Element, kHeadDim>>("sm_90a", "forward", dtype);
  print<bsfa::sm90::SelectConfig<Element, int8_t, kHeadDim>>("sm_90a", "select_int8", dtype);
  print<bsfa::sm90::SelectConfig<Element, Element, kHeadDim>>("sm_90a", "select_exact", dtype);
  print<bsfa::sm90::OwnListsConfig<Element, kHeadDim>>("sm_90a", "attend", dtype);
}

int main() {
  print_all<cutlass::half_t, 64>("float16");
  print_all<cutlass::half_t, 128>("float16");
  print_all<cutlass::half_t, 256>("float16");
  print_all<cutlass::bfloat16_t, 64>("bfloat16");
  print_all<cutlass::bfloat16_t, 128>("bfloat16");
  print_all<cutlass::bfloat16_t, 256>("bfloat16");
  return 0;
}
