// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// How the library fails: one exception, thrown by three checks and caught at the C interface.
#pragma once

#include <bsfa/bsfa.h>

#include <cstdio>
#include <exception>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#if defined(BSFA_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace bsfa {

// What leaves a function of the library that cannot do its work: a status of the C interface and the text
// that bsfa_last_error() gives.
class Error : public std::exception {
 public:
  Error(bsfa_status status, std::string message) : status_(status), message_(std::move(message)) {}

  bsfa_status status() const noexcept { return status_; }
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  bsfa_status status_;
  std::string message_;
};

namespace detail {

template <class Part>
void append(std::string& text, const Part& part) {
  if constexpr (std::is_convertible_v<const Part&, std::string_view>) {
    text += std::string_view(part);
  } else if constexpr (std::is_floating_point_v<Part>) {
    char digits[32];
    std::snprintf(digits, sizeof(digits), "%g", static_cast<double>(part));
    text += digits;
  } else if constexpr (std::is_enum_v<Part>) {
    text += std::to_string(static_cast<std::underlying_type_t<Part>>(part));
  } else {
    text += std::to_string(part);
  }
}

}  // namespace detail

// Joins strings and numbers to one text.
template <class... Parts>
std::string join(const Parts&... parts) {
  std::string text;
  (detail::append(text, parts), ...);
  return text;
}

template <class... Parts>
[[noreturn]] void fail(bsfa_status status, const Parts&... parts) {
  throw Error(status, join(parts...));
}

}  // namespace bsfa

// The caller broke a rule. State the rule and the value:
//   BSFA_CHECK(heads % kv_heads == 0, "kv_heads must divide heads, got ", kv_heads, " and ", heads);
#define BSFA_CHECK(condition, ...)                      \
  do {                                                  \
    if (!(condition)) {                                 \
      ::bsfa::fail(BSFA_INVALID_ARGUMENT, __VA_ARGS__); \
    }                                                   \
  } while (false)

// The call is valid, but not for this build or this GPU. State what there is and what is needed.
#define BSFA_CHECK_SUPPORTED(condition, ...)       \
  do {                                             \
    if (!(condition)) {                            \
      ::bsfa::fail(BSFA_UNSUPPORTED, __VA_ARGS__); \
    }                                              \
  } while (false)

#if defined(BSFA_WITH_CUDA)
// A call of the CUDA runtime must succeed. After a launch: BSFA_CUDA_CHECK(cudaGetLastError()). The error is
// taken from the runtime, so that the caller's next call does not meet it again.
#define BSFA_CUDA_CHECK(call)                                                                     \
  do {                                                                                            \
    const cudaError_t bsfa_cuda_status = (call);                                                  \
    if (bsfa_cuda_status != cudaSuccess) {                                                        \
      cudaGetLastError();                                                                         \
      ::bsfa::fail(BSFA_CUDA_ERROR, #call, " failed: ", cudaGetErrorName(bsfa_cuda_status), ": ", \
                   cudaGetErrorString(bsfa_cuda_status));                                         \
    }                                                                                             \
  } while (false)
#endif
