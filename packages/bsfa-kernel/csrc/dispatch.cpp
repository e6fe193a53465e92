// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

#include "dispatch.hpp"

#include <algorithm>

#include "check.hpp"

#if defined(BSFA_WITH_CUDA)
#include "common/select_workspace.hpp"
#include "sm80/attend.hpp"
#include "sm80/block_maxima.hpp"
#include "sm80/forward.hpp"
#include "sm80/select.hpp"
#include "sm90/attend.hpp"
#include "sm90/forward.hpp"
#include "sm90/select.hpp"

namespace cutlass {
struct half_t;
struct bfloat16_t;
}  // namespace cutlass
#endif

namespace bsfa {

#if BSFA_SM80_PTX
constexpr const char* kSm80Reach = "sm_80 kernels run on 8.0 and newer";
#elif BSFA_SM80_ON_90
constexpr const char* kSm80Reach = "sm_80 kernels run on 8.x and 9.0";
#else
constexpr const char* kSm80Reach = "sm_80 kernels run on 8.x";
#endif

const std::initializer_list<Kernel<ForwardParams>> kForwardKernels = {
#include "forward_kernels.inc"
};

const std::initializer_list<Kernel<BlockMaximaParams>> kBlockMaximaKernels = {
#include "block_maxima_kernels.inc"
};

const std::initializer_list<Kernel<SelectParams>> kSelectBlocksKernels = {
#include "select_blocks_kernels.inc"
};

const std::initializer_list<Kernel<AttendParams>> kAttendBlocksKernels = {
#include "attend_blocks_kernels.inc"
};

const char* dtype_name(int dtype) {
  return dtype == BSFA_FLOAT16 ? "float16" : "bfloat16";
}

bool runs_on(int arch, int capability) {
  if (arch == 90) {
    return capability == 90;
  }
  const bool compiled = capability / 10 == 8 || (BSFA_SM80_ON_90 && capability == 90);
  return compiled || (BSFA_SM80_PTX && capability > 80);
}

namespace {

template <class Params>
bool matches(const Kernel<Params>& kernel, const Request& request) {
  return kernel.dtype == request.dtype && kernel.least_head_dim() <= request.head_dim &&
         request.head_dim <= kernel.head_dim && (request.arch == 0 || kernel.arch == request.arch);
}

std::string describe(const Request& request) {
  std::string text = join(dtype_name(request.dtype), " with head_dim ", request.head_dim);
  if (request.arch != 0) {
    text += join(" on sm_", request.arch);
  }
  return text;
}

template <class Params>
std::string list(const std::initializer_list<Kernel<Params>>& kernels) {
  std::string text;
  for (const Kernel<Params>& kernel : kernels) {
    text += join(text.empty() ? "" : ", ", dtype_name(kernel.dtype), " with head_dim ",
                 kernel.least_head_dim(), " to ", kernel.head_dim, " on sm_", kernel.arch);
  }
  return text;
}

// Bytes of workspace that a kernel needs, by what does not point anywhere. Without CUDA there is no kernel.
uint64_t needed([[maybe_unused]] const Kernel<SelectParams>& kernel,
                [[maybe_unused]] const SelectParams& params) {
#if defined(BSFA_WITH_CUDA)
  return select_blocks_workspace(params, kernel.head_dim);
#else
  return 0;
#endif
}

uint64_t needed([[maybe_unused]] const Kernel<AttendParams>& kernel,
                [[maybe_unused]] const AttendParams& params) {
#if defined(BSFA_WITH_CUDA)
  return kernel.arch == 90 ? sm90::attend_blocks_workspace(params) : 0;
#else
  return 0;
#endif
}

}  // namespace

template <class Params>
void check_built(const std::initializer_list<Kernel<Params>>& kernels, const Request& request) {
  BSFA_CHECK_SUPPORTED(kernels.size() > 0, "this libbsfa was built without ", request.name,
                       " kernels: build it with nvcc 12.4 or newer and BSFA_CUDA=ON (docs/build.md)");
  for (const Kernel<Params>& kernel : kernels) {
    if (matches(kernel, request)) {
      return;
    }
  }
  fail(BSFA_UNSUPPORTED, "this libbsfa has no ", request.name, " kernel for ", describe(request), "; it has ",
       list(kernels));
}

template <class Params>
const Kernel<Params>& select(const std::initializer_list<Kernel<Params>>& kernels, const Request& request,
                             int capability) {
  const Kernel<Params>* best = nullptr;
  for (const Kernel<Params>& kernel : kernels) {
    if (matches(kernel, request) && runs_on(kernel.arch, capability) &&
        (best == nullptr || kernel.arch > best->arch)) {
      best = &kernel;
    }
  }
  BSFA_CHECK_SUPPORTED(best != nullptr, "this GPU has compute capability ", capability / 10, ".",
                       capability % 10, ", and no ", request.name, " kernel for ", describe(request),
                       " in this libbsfa runs on it (", kSm80Reach, ", sm_90 kernels on 9.0); it has ",
                       list(kernels));
  return *best;
}

template <class Params>
uint64_t workspace_bytes(const std::initializer_list<Kernel<Params>>& kernels, const Request& request,
                         const Params& params) {
  uint64_t bytes = 0;
  for (const Kernel<Params>& kernel : kernels) {
    if (matches(kernel, request)) {
      bytes = std::max(bytes, needed(kernel, params));
    }
  }
  return bytes;
}

template uint64_t workspace_bytes(const std::initializer_list<Kernel<SelectParams>>&, const Request&,
                                  const SelectParams&);
template uint64_t workspace_bytes(const std::initializer_list<Kernel<AttendParams>>&, const Request&,
                                  const AttendParams&);

#define BSFA_INSTANTIATE(Params)                                                           \
  template void check_built(const std::initializer_list<Kernel<Params>>&, const Request&); \
  template const Kernel<Params>& select(const std::initializer_list<Kernel<Params>>&, const Request&, int)

BSFA_INSTANTIATE(ForwardParams);
BSFA_INSTANTIATE(BlockMaximaParams);
BSFA_INSTANTIATE(SelectParams);
BSFA_INSTANTIATE(AttendParams);

}  // namespace bsfa
