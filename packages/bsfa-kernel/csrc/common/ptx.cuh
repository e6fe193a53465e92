// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// Inline assembly: what CUDA C++ has no function for, and where CuTe's wrappers take references and these
// take addresses in shared memory, on which the kernels do arithmetic.
#pragma once

#include <cstdint>

namespace bsfa::ptx {

// 2^x, to about 2 units in the last place; results below the normal range are 0. [ex2.approx.ftz.f32]
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The logarithm to base 2, to 2^-22 between 0.5 and 2.  [lg2.approx.ftz.f32]
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger one, and NaN where one is NaN.  [max.NaN.f32]
__device__ __forceinline__ float max_nan(float x, float y) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
  return result;
}

// The float with the largest bits of three, as signed integers.  [max.s32, of which ptxas makes VIMNMX3]
__device__ __forceinline__ float max_bits(float x, float y, float z) {
  float result;
  asm("{\n"
      ".reg .s32 x, y, z;\n"
      "mov.b32 x, %1;\n"
      "mov.b32 y, %2;\n"
      "mov.b32 z, %3;\n"
      "max.s32 x, x, y;\n"
      "max.s32 x, x, z;\n"
      "mov.b32 %0, x;\n"
      "}"
      : "=f"(result)
      : "f"(x), "f"(y), "f"(z));
  return result;
}

// The float with the smallest bits of three, as unsigned integers.  [min.u32]
__device__ __forceinline__ float min_bits(float x, float y, float z) {
  float result;
  asm("{\n"
      ".reg .u32 x, y, z;\n"
      "mov.b32 x, %1;\n"
      "mov.b32 y, %2;\n"
      "mov.b32 z, %3;\n"
      "min.u32 x, x, y;\n"
      "min.u32 x, x, z;\n"
      "mov.b32 %0, x;\n"
      "}"
      : "=f"(result)
      : "f"(x), "f"(y), "f"(z));
  return result;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8x8 matrices of 16-bit elements; lane i names row i % 8 of matrix i / 8.  [ldmatrix.x4]
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared));
}

// The same, each matrix transposed.  [ldmatrix.x4.trans]
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&matrices)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared));
}

// In a kernel launched to start early: until the kernel before it in the stream is complete, and what it
// wrote can be seen. Before this a thread may read nothing in global memory that earlier work writes, and
// write nothing that it reads or writes. For sm_90.  [griddepcontrol.wait]
__device__ __forceinline__ void wait_for_earlier_grids() {
  asm volatile("griddepcontrol.wait;" : : : "memory");
}

// Starts the copy of 16 bytes from global to shared memory, past L1.  [cp.async.cg]
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" : : "r"(shared), "l"(global) : "memory");
}

// The same, or 16 bytes of zeros where not `exists`; then `global` is not read.  [cp.async.cg, src-size 0]
__device__ __forceinline__ void copy_async_or_zero(uint32_t shared, const void* global, bool exists) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :
               : "r"(shared), "l"(global), "r"(exists ? 16 : 0)
               : "memory");
}

// Closes a group of copies.  [cp.async.commit_group]
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" : : : "memory");
}

// Waits until all of the thread's groups but the last `kPending` have arrived.  [cp.async.wait_group]
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

// x, about which the compiler forgets what it knew: what follows from it is computed again where it is
// needed, and is not kept in registers through a loop that has none to spare.
__device__ __forceinline__ int forget(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// In a branch that is seldom taken: keeps the compiler from making predicated instructions of it, each of
// which would cost an issue slot where the branch is not taken, too.
__device__ __forceinline__ void keep_branch() {
  asm volatile("bar.warp.sync 0xffffffff;" : : : "memory");
}

// So many instructions that do nothing, by which the code behind them is placed later.  [bar.warp.sync]
template <int kInstructions>
__device__ __forceinline__ void pad() {
  if constexpr (kInstructions > 0) {
    asm volatile("bar.warp.sync 0xffffffff;" : : : "memory");
    pad<kInstructions - 1>();
  }
}

// Whether this is the lane that works for its warp, all of whose lanes must ask. ptxas knows that there is
// but one. Of a lane found by its number it does not, and makes a loop over lanes around each load by TMA.
// For sm_90.  [elect.sync]
__device__ __forceinline__ bool is_elected() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred elected;\n"
      "elect.sync _|elected, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, elected;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
}

// The elected thread arrives at an mbarrier, without a branch. For sm_90.  [mbarrier.arrive]
__device__ __forceinline__ void arrive(uint32_t barrier_address, bool elected) {
  asm volatile(
      "{\n"
      ".reg .pred elected;\n"
      "setp.ne.u32 elected, %1, 0;\n"
      "@elected mbarrier.arrive.shared::cta.b64 _, [%0];\n"
      "}"
      :
      : "r"(barrier_address), "r"(static_cast<uint32_t>(elected))
      : "memory");
}

// A thread arrives so many times at once. For sm_90.  [mbarrier.arrive]
__device__ __forceinline__ void arrive_times(uint32_t barrier_address, uint32_t times) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(barrier_address), "r"(times)
               : "memory");
}

// 16 bytes of shared memory that another thread may be writing.  [ld.volatile.v4]
__device__ __forceinline__ uint4 load_volatile(uint32_t address) {
  uint4 words;
  asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(address)
               : "memory");
  return words;
}

// 8 bytes of shared memory, written at once.  [st.volatile.u64]
__device__ __forceinline__ void store_volatile(uint32_t address, uint32_t lower, uint32_t upper) {
  const uint64_t both = uint64_t{upper} << 32 | lower;
  asm volatile("st.volatile.shared.u64 [%0], %1;" : : "r"(address), "l"(both) : "memory");
}

// The elected thread writes a byte of shared memory and then arrives at an mbarrier. A branch would cost more
// than both. For sm_90.  [st.shared.u8, mbarrier.arrive]
__device__ __forceinline__ void store_byte_and_arrive(uint32_t byte_address, uint32_t value,
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
