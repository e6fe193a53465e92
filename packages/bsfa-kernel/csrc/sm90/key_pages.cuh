// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// Loading keys and values that lie in pages: block after block by one thread, or any load by a warp, whose
// lanes find the pages and one of which speaks to the copy engine.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "tensor_map.hpp"

namespace bsfa::sm90 {

// A load is kKeys keys long and takes boxes of page_box_rows() keys, each in one page.
template <int kKeys>
class PagedLoads {
 public:
  // Both are kept by reference: a producer has no registers for copies.
  __device__ __forceinline__ PagedLoads(const Problem& problem, const Sequence& sequence)
      : problem_(problem), sequence_(sequence) {}

  // Where the boxes of the load that begins at `first_key` lie: box i in lane i. Of boxes behind the last
  // key, and of pages that do not exist, the copy engine makes zeros: a load always has the same bytes.
  // Called ahead of load(), so that nobody waits for the table.
  __device__ __forceinline__ PagedRow find(int first_key) const {
    const int offset =
        min(static_cast<int>(threadIdx.x % 32) * box_rows(), kKeys);  // the sum must not overflow
    const int end = sequence_.oversized ? 0 : sequence_.seqlen_k;
    return offset < kKeys && first_key + offset < end
               ? page_table(problem_, sequence_).find(first_key + offset)
               : PagedRow{problem_.pages, 0};
  }

  // Loads what was found to `to`, in kBoxes columns of boxes, `column_elements` apart. All lanes of the warp
  // must come.
  template <int kBoxes, int kBoxColumns, class Element>
  __device__ __forceinline__ void load(const CUtensorMap& map, cutlass::arch::ClusterTransactionBarrier& full,
                                       const PagedRow& found, int head, Element* to,
                                       int column_elements) const {
#pragma unroll
    for (int index = 0; index < kMostBoxes; ++index) {
      if (index < boxes()) {
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
    }
    __syncwarp();
  }

 private:
  static constexpr int kMostBoxes = kKeys / 16;

  __device__ __forceinline__ int box_rows() const { return page_box_rows(problem_.page_size.value); }
  // Of a load; a power of two.
  __device__ __forceinline__ int boxes() const { return kKeys >> (__ffs(box_rows()) - 1); }

  const Problem& problem_;
  const Sequence& sequence_;
};

// A walk over a sequence's keys from the last box to the first, by one thread.
class PageWalk {
 public:
  // The first load begins at `first_key` and is kKeyBlock keys long, as all are.
  __device__ __forceinline__ PageWalk(const Problem& problem, const Sequence& sequence, int first_key)
      : problem_(problem),
        entry_(page_table(problem, sequence).entries),
        end_(sequence.oversized ? 0 : sequence.seqlen_k) {
    key_ = first_key + kKeyBlock - box_rows();
    const int number = problem.page_size.quotient(max(key_, 0));
    row_ = max(key_, 0) - number * problem.page_size.value;
    entry_ += number;
    page_ = key_ >= 0 && key_ - row_ < end_ ? *entry_ : problem.pages;  // its first boxes may be in use
    next_ = entry_before();
  }

  // Loads the next kKeyBlock keys to `to`, in kBoxes columns of boxes, `column_elements` apart.
  template <int kBoxes, int kBoxColumns, class Element>
  __device__ __forceinline__ void load(const CUtensorMap& map, cutlass::arch::ClusterTransactionBarrier& full,
                                       int head, Element* to, int column_elements) {
#pragma unroll 1
    for (int first_row = kKeyBlock - box_rows(); first_row >= 0; first_row -= box_rows()) {
      const int page = key_ < end_ ? page_ : problem_.pages;
#pragma unroll
      for (int box = 0; box < kBoxes; ++box) {
        cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<uint64_t*>(&full),
                                     static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST),
                                     to + first_row * kBoxColumns + box * column_elements, box * kBoxColumns,
                                     row_, head, page);
      }
      step();
    }
  }

  // Passes over the next kKeyBlock keys.
  __device__ __forceinline__ void skip() {
#pragma unroll 1
    for (int rows = kKeyBlock; rows > 0; rows -= box_rows()) {
      step();
    }
  }

 private:
  __device__ __forceinline__ int box_rows() const { return page_box_rows(problem_.page_size.value); }

  // To the box before. A page's number is read when the walk enters the one behind it.
  __device__ __forceinline__ void step() {
    key_ -= box_rows();
    row_ -= box_rows();
    if (row_ < 0) {
      row_ += problem_.page_size.value;
      --entry_;
      page_ = next_;
      next_ = entry_before();
    }
  }
  // Of the page before: any number where there is none, or where it is behind the last key.
  __device__ __forceinline__ int entry_before() const {
    const int last_key = key_ - row_ - 1;  // of that page
    const bool exists = last_key >= 0 && last_key - problem_.page_size.value + 1 < end_;
    return exists ? __ldg(entry_ - 1) : problem_.pages;
  }

  const Problem& problem_;
  const int32_t* entry_;  // of the page
  int end_;               // keys
  int key_;               // the box's first
  int row_;               // the same in the page
  int page_;
  int next_;  // the page before
};

}  // namespace bsfa::sm90
