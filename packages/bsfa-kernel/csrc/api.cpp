// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The C interface. A call checks its arguments, looks for a kernel, guards the device, launches; whatever
// fails on the way becomes a status and a text, since no exception may cross extern "C".

#include <bsfa/bsfa.h>

#include <exception>
#include <string>

#include "build_info.hpp"
#include "check.hpp"
#include "dispatch.hpp"
#include "validate.hpp"

#if defined(BSFA_WITH_CUDA)
#include "device.hpp"
#endif

namespace bsfa {
namespace {

std::string& last_error() {
  thread_local std::string message;
  return message;
}

bsfa_status record(bsfa_status status, const char* message) noexcept {
  try {
    last_error() = message;
  } catch (...) {
    last_error().clear();  // out of memory for the text; the status still tells
  }
  return status;
}

// Runs the body of a function of the C interface.
template <class Body>
bsfa_status guarded(const Body& body) noexcept {
  try {
    body();
    return BSFA_OK;
  } catch (const Error& error) {
    return record(error.status(), error.what());
  } catch (const std::exception& error) {
    return record(BSFA_INTERNAL_ERROR, error.what());
  } catch (...) {
    return record(BSFA_INTERNAL_ERROR, "an exception of unknown type");
  }
}

#if defined(BSFA_WITH_CUDA)
template <class Params>
void launch(const std::initializer_list<Kernel<Params>>& kernels, const Request& request,
            const Params& params, int device, cudaStream_t stream) {
  const Kernel<Params>& kernel = select(kernels, request, compute_capability(device));
  kernel.launch(params, stream);
  BSFA_CUDA_CHECK(cudaGetLastError());
}

// The columns of `kept` of sequences none of which has a query: elsewhere the kernel clears what is spare.
void clear_kept(const ForwardParams& params, cudaStream_t stream) {
  const int64_t columns = params.batch;
  BSFA_CUDA_CHECK(cudaMemsetAsync(params.kept, 0, sizeof(int32_t) * columns * params.heads, stream));
}
#endif

void forward(const bsfa_forward_args* args) {
  const ForwardParams params = validate(args);
  const bool no_query = params.batch == 0 || params.seqlen_q == 0;
  if (no_query && (params.kept == nullptr || !params.is_packed() || params.batch == 0)) {
    return;
  }
  const bsfa_problem& problem = args->problem;
  const Request request{"forward", problem.arch, problem.dtype, static_cast<int>(problem.head_dim)};
  check_built(kForwardKernels, request);
#if defined(BSFA_WITH_CUDA)
  const auto stream = static_cast<cudaStream_t>(problem.stream);
  const DeviceGuard guard(problem.device);
  if (no_query) {
    clear_kept(params, stream);
  } else {
    launch(kForwardKernels, request, params, problem.device, stream);
  }
#endif
}

void block_maxima(const bsfa_block_maxima_args* args) {
  const BlockMaximaParams params = validate(args);
  if (params.maxima == nullptr) {
    return;  // no block
  }
  const bsfa_problem& problem = args->problem;
  const Request request{"block_maxima", problem.arch, problem.dtype, static_cast<int>(problem.head_dim)};
  check_built(kBlockMaximaKernels, request);
#if defined(BSFA_WITH_CUDA)
  const DeviceGuard guard(problem.device);
  launch(kBlockMaximaKernels, request, params, problem.device, static_cast<cudaStream_t>(problem.stream));
#endif
}

}  // namespace
}  // namespace bsfa

extern "C" {

bsfa_status bsfa_forward(const bsfa_forward_args* args) {
  return bsfa::guarded([&] { bsfa::forward(args); });
}

bsfa_status bsfa_block_maxima(const bsfa_block_maxima_args* args) {
  return bsfa::guarded([&] { bsfa::block_maxima(args); });
}

const char* bsfa_version(void) {
  return BSFA_VERSION;
}

uint32_t bsfa_abi_version(void) {
  return BSFA_ABI_VERSION;
}

const char* bsfa_build_info(void) {
  try {
    static const std::string text = bsfa::build_info();
    return text.c_str();
  } catch (...) {
    return "{}";  // out of memory
  }
}

const char* bsfa_last_error(void) {
  return bsfa::last_error().c_str();
}

}  // extern "C"
