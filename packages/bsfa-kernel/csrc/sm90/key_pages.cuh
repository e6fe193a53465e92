// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// Loading keys and values that lie in pages: a warp finds the pages, one of its lanes speaks to the copy
// engine.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "tensor_map.hpp"

namespace bsfa::sm90 {

// A load is kKeys keys long and takes boxes of page_box_rows() keys, each in one page. Lane i knows the page
// of box i.
template <int kKeys>
class PagedLoads {
 public:
  // Both are kept by reference: a producer has no registers for copies.
  __device__ __forceinline__ PagedLoads(const Problem& problem, const Sequence& sequence)
      : problem_(problem), sequence_(sequence) {}

  // Where the lane's box of the load that begins at `first_key` lies. Called ahead of load(), so that nobody
  // waits for the table. Boxes behind the last key have page `pages`, of which the copy engine makes zeros: a
  // load always has the same number of bytes.
  __device__ __forceinline__ PagedRow find(int first_key) const {
    const int offset = threadIdx.x % 32 * box_rows();
    const int key = first_key + offset;
    const int end = sequence_.oversized ? 0 : sequence_.seqlen_k;
    return offset < kKeys && key < end ? page_table(problem_, sequence_).find(key)
                                       : PagedRow{problem_.pages, 0};
  }

  // Loads what find() has found to `to`, in kBoxes columns of boxes, `column_elements` apart. All lanes of
  // the warp must come.
  template <int kBoxes, int kBoxColumns, class Element>
  __device__ __forceinline__ void load(const CUtensorMap& map, cutlass::arch::ClusterTransactionBarrier& full,
                                       const PagedRow& found, int head, Element* to,
                                       int column_elements) const {
#pragma unroll 1
    for (int index = 0; index * box_rows() < kKeys; ++index) {
      const int page = __shfl_sync(0xffffffff, found.page, index);
      const int row = __shfl_sync(0xffffffff, found.row, index);
      if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int box = 0; box < kBoxes; ++box) {
          cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<uint64_t*>(&full),
                                       static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST),
                                       to + index * box_rows() * kBoxColumns + box * column_elements,
                                       box * kBoxColumns, row, head, page);
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

}  // namespace bsfa::sm90
