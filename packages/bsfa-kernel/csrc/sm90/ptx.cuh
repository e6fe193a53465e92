// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// Inline assembly of sm_90: what neither CUDA C++ nor CUTLASS has a function for.
#pragma once

#include <cstdint>

namespace bsfa::ptx {

// The elected thread writes a byte of shared memory and then arrives at an mbarrier. A branch would cost more
// than both.  [st.shared.u8, mbarrier.arrive]
__device__ __forceinline__ void store_and_arrive(uint32_t byte_address, uint32_t value,
                                                 uint32_t barrier_address, bool elected) {
  asm volatile(
      "{\n"
      ".reg .pred elected;\n"
      "setp.ne.u32 elected, %3, 0;\n"
      "@elected st.shared.u8 [%0], %1;\n"
      "@elected mbarrier.arrive.shared::cta.b64 _, [%2];\n"
      "}"
      :
      : "r"(byte_address), "r"(value), "r"(barrier_address), "r"(static_cast<uint32_t>(elected))
      : "memory");
}

}  // namespace bsfa::ptx
