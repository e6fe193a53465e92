// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// Finding and loading keys and values that lie in pages.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "../common/ptx.cuh"
#include "tensor_map.hpp"

namespace bsfa::sm90 {

// Loads a box: kBoxes columns of it, `column_elements` apart in shared memory. By one thread.
template <int kBoxes, int kBoxColumns, class Element>
__device__ __forceinline__ void load_box(const CUtensorMap& map,
                                         cutlass::arch::ClusterTransactionBarrier& full, const PagedRow& box,
                                         int head, Element* to, int column_elements) {
#pragma unroll
  for (int column = 0; column < kBoxes; ++column) {
    cute::SM90_TMA_LOAD_4D::copy(
        &map, reinterpret_cast<uint64_t*>(&full), static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST),
        to + column * column_elements, column * kBoxColumns, box.row, head, box.page);
  }
}

// log2 of the boxes that kKeys keys take, each in one page.
template <int kKeys>
__device__ __forceinline__ int boxes_bits(const Problem& problem) {
  return problem.has_pages() ? __ffs(kKeys) - __ffs(page_box_rows(problem.page_size.value)) : 0;
}

// Where the box that begins at `key` lies in pages. One that is not wanted, or that lies behind the last key,
// has page `pages`, of which the copy engine makes zeros: a load always has the same number of bytes.
__device__ __forceinline__ PagedRow find_paged_box(const Problem& problem, const Sequence& sequence, int key,
                                                   bool wanted) {
  const int end = sequence.oversized ? 0 : sequence.seqlen_k;
  return wanted && key < end ? page_table(problem, sequence).find(key) : PagedRow{problem.pages, 0};
}

// Loads of kKeys keys in pages, by a warp.
template <int kKeys>
class PagedLoads {
 public:
  // Both are kept by reference: a producer has no registers for copies.
  __device__ __forceinline__ PagedLoads(const Problem& problem, const Sequence& sequence)
      : problem_(problem), sequence_(sequence) {}

  // Where the boxes of the load that begins at `first_key` lie: box i in lane i. Called ahead of load(), so
  // that nobody waits for the table.
  __device__ __forceinline__ PagedRow find(int first_key) const {
    const int offset =
        min(static_cast<int>(threadIdx.x % 32) * box_rows(), kKeys);  // the sum must not overflow
    return find_paged_box(problem_, sequence_, first_key + offset, offset < kKeys);
  }

  // Loads what was found to `to`, in kBoxes columns of boxes, `column_elements` apart.
  template <int kBoxes, int kBoxColumns, class Element>
  __device__ __forceinline__ void load(const CUtensorMap& map, cutlass::arch::ClusterTransactionBarrier& full,
                                       const PagedRow& found, int head, Element* to,
                                       int column_elements) const {
#pragma unroll
    for (int index = 0; index < kKeys / 16; ++index) {
      if (index < 1 << boxes_bits<kKeys>(problem_)) {
        const PagedRow box{__shfl_sync(0xffffffff, found.page, index),
                           __shfl_sync(0xffffffff, found.row, index)};
        if (ptx::is_elected()) {
          load_box<kBoxes, kBoxColumns>(map, full, box, head, to + index * box_rows() * kBoxColumns,
                                        column_elements);
        }
      }
    }
    __syncwarp();
  }

 private:
  __device__ __forceinline__ int box_rows() const { return page_box_rows(problem_.page_size.value); }

  const Problem& problem_;
  const Sequence& sequence_;
};

// The boxes of blocks of keys, found by a warp for those that load them.
struct FoundBoxes {
  static constexpr int kBoxes = 32;  // found at a time
  static constexpr int kStages = 4;

  PagedRow boxes[kStages][kBoxes];
  cutlass::arch::ClusterBarrier full[kStages];
  cutlass::arch::ClusterBarrier empty[kStages];
};

}  // namespace bsfa::sm90
