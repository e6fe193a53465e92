// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// dispatch <capability> <arch or 0> <dtype> <head_dim>: prints the architecture of the forward kernel that
// such a call gets, or the message. Linked with csrc/dispatch.cpp and tables of kernels without code.

#include "dispatch.hpp"

#include <cstdio>
#include <cstdlib>

#include "check.hpp"

int main(int count, char** values) {
  if (count != 5) {
    return 2;
  }
  const bsfa::Request request{"forward", std::atoi(values[2]), std::atoi(values[3]), std::atoi(values[4])};
  try {
    bsfa::check_built(bsfa::kForwardKernels, request);
    std::printf("%d\n", bsfa::select(bsfa::kForwardKernels, request, std::atoi(values[1])).arch);
  } catch (const bsfa::Error& error) {
    std::printf("%d: %s\n", error.status(), error.what());
  }
  return 0;
}
