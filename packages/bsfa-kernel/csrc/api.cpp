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
  const int64_t rows = int64_t{params.packs_queries() ? 1 : params.batch} * params.heads;
  const int64_t columns = params.query_blocks(params.q_block);
  BSFA_CUDA_CHECK(cudaMemsetAsync(params.kept, 0, sizeof(int32_t) * rows * columns, stream));
}
#endif

bool has_queries(const Problem& problem) {
  return problem.batch > 0 && problem.seqlen_q > 0;
}

// Whether a call of attention has nothing to write. Without queries there are spare columns of kept.
bool writes_nothing(const ForwardParams& params) {
  return !has_queries(params) && (params.kept == nullptr || !params.has_spare_blocks() || params.batch == 0);
}

Request make_request(const char* name, const bsfa_problem& problem) {
  return {name, problem.arch, problem.dtype, static_cast<int>(problem.head_dim)};
}

// Runs attention: a kernel, or what is left to do where there is no query.
template <class Params>
void attend(const std::initializer_list<Kernel<Params>>& kernels, const Request& request,
            const Params& params, const bsfa_problem& problem) {
#if defined(BSFA_WITH_CUDA)
  const auto stream = static_cast<cudaStream_t>(problem.stream);
  const DeviceGuard guard(problem.device);
  if (has_queries(params)) {
    launch(kernels, request, params, problem.device, stream);
  } else {
    clear_kept(params, stream);
  }
#else
  (void)kernels, (void)request, (void)params, (void)problem;
#endif
}

void forward(const bsfa_forward_args* args) {
  const ForwardParams params = validate(args);
  if (writes_nothing(params)) {
    return;
  }
  const Request request = make_request("forward", args->problem);
  check_built(kForwardKernels, request);
  attend(kForwardKernels, request, params, args->problem);
}

void block_maxima(const bsfa_block_maxima_args* args) {
  const BlockMaximaParams params = validate(args);
  if (params.maxima == nullptr) {
    return;  // no block
  }
  const bsfa_problem& problem = args->problem;
  const Request request = make_request("block_maxima", problem);
  check_built(kBlockMaximaKernels, request);
#if defined(BSFA_WITH_CUDA)
  const DeviceGuard guard(problem.device);
  launch(kBlockMaximaKernels, request, params, problem.device, static_cast<cudaStream_t>(problem.stream));
#endif
}

void select_blocks(const bsfa_select_blocks_args* args) {
  const SelectParams params = validate(args);
  if (params.block_mask == nullptr) {
    return;  // no word
  }
  const bsfa_problem& problem = args->problem;
  const Request request = make_request("select_blocks", problem);
  check_built(kSelectBlocksKernels, request);
  if (has_queries(params)) {
    check_workspace(args->workspace, args->workspace_bytes,
                    workspace_bytes(kSelectBlocksKernels, request, params));
  }
#if defined(BSFA_WITH_CUDA)
  const DeviceGuard guard(problem.device);
  launch(kSelectBlocksKernels, request, params, problem.device, static_cast<cudaStream_t>(problem.stream));
#endif
}

void attend_blocks(const bsfa_attend_blocks_args* args) {
  const AttendParams params = validate(args);
  if (writes_nothing(params)) {
    return;
  }
  const Request request = make_request("attend_blocks", args->problem);
  check_built(kAttendBlocksKernels, request);
  if (has_queries(params)) {
    check_workspace(args->workspace, args->workspace_bytes,
                    workspace_bytes(kAttendBlocksKernels, request, params));
  }
  attend(kAttendBlocksKernels, request, params, args->problem);
}

// Where a call needs none it may have no kernel either.
template <class Args, class Params>
void workspace(const Args* args, const char* name, const std::initializer_list<Kernel<Params>>& kernels,
               uint64_t* bytes) {
  const Params params = validate_shape(args);
  BSFA_CHECK(bytes != nullptr, "bytes must not be null");
  *bytes = 0;
  if (has_queries(params)) {
    const Request request = make_request(name, args->problem);
    check_built(kernels, request);
    *bytes = workspace_bytes(kernels, request, params);
  }
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

bsfa_status bsfa_select_blocks(const bsfa_select_blocks_args* args) {
  return bsfa::guarded([&] { bsfa::select_blocks(args); });
}

bsfa_status bsfa_attend_blocks(const bsfa_attend_blocks_args* args) {
  return bsfa::guarded([&] { bsfa::attend_blocks(args); });
}

bsfa_status bsfa_select_blocks_workspace(const bsfa_select_blocks_args* args, uint64_t* bytes) {
  return bsfa::guarded([&] { bsfa::workspace(args, "select_blocks", bsfa::kSelectBlocksKernels, bytes); });
}

bsfa_status bsfa_attend_blocks_workspace(const bsfa_attend_blocks_args* args, uint64_t* bytes) {
  return bsfa::guarded([&] { bsfa::workspace(args, "attend_blocks", bsfa::kAttendBlocksKernels, bytes); });
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
