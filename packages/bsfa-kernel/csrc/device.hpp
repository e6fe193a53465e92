// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// The GPU that a call runs on.
#pragma once

#include <cuda_runtime_api.h>

#include "check.hpp"

namespace bsfa {

// Makes `device` the calling thread's device, and the previous one again at the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    BSFA_CUDA_CHECK(cudaGetDevice(&previous_));
    if (device != previous_) {
      int count = 0;
      BSFA_CUDA_CHECK(cudaGetDeviceCount(&count));
      BSFA_CHECK(device < count, "device must be below the number of CUDA devices, ", count, ", got ",
                 device);
      BSFA_CUDA_CHECK(cudaSetDevice(device));
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) {
      cudaSetDevice(previous_);
    }
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Compute capability times ten: 80 for an A100, 90 for an H100.
inline int compute_capability(int device) {
  int major = 0;
  int minor = 0;
  BSFA_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  BSFA_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return 10 * major + minor;
}

}  // namespace bsfa
