// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

#include "build_info.hpp"

#include "check.hpp"
#include "dispatch.hpp"

namespace bsfa {
namespace {

template <class Params>
std::string list_head_dims(const Kernel<Params>& kernel) {
  std::string text;
  for (int head_dim = kernel.least_head_dim(); head_dim <= kernel.head_dim; head_dim += kHeadDimStep) {
    text += join(text.empty() ? "" : ", ", head_dim);
  }
  return text;
}

template <class Params>
void append_kernels(std::string& text, const char* name,
                    const std::initializer_list<Kernel<Params>>& kernels) {
  for (const Kernel<Params>& kernel : kernels) {
    text += join(text.back() == '[' ? "" : ", ", "{\"name\": \"", name, "\", \"arch\": ", kernel.arch,
                 ", \"ptx\": ", kernel.arch == 80 && BSFA_SM80_PTX ? "true" : "false", ", \"dtype\": \"",
                 dtype_name(kernel.dtype), "\", \"head_dim\": ", kernel.head_dim, ", \"head_dims\": [",
                 list_head_dims(kernel), "], \"geometries\": [\"128x64\", \"64x64\"]}");
  }
}

}  // namespace

std::string build_info() {
#if defined(BSFA_WITH_CUDA)
  const std::string cuda = "\"" BSFA_CUDA_VERSION "\"";
#else
  const std::string cuda = "null";
#endif
  std::string text = join("{\"version\": \"" BSFA_VERSION "\", \"abi_version\": ", BSFA_ABI_VERSION,
                          ", \"cuda\": ", cuda, ", \"kernels\": [");
  append_kernels(text, "forward", kForwardKernels);
  append_kernels(text, "block_maxima", kBlockMaximaKernels);
  append_kernels(text, "select_blocks", kSelectBlocksKernels);
  append_kernels(text, "attend_blocks", kAttendBlocksKernels);
  return text + "]}";
}

}  // namespace bsfa
