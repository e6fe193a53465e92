// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// Loading keys and values that lie in pages: a warp finds the pages, one of its lanes speaks to the copy
// engine.
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

  // Where the boxes of the load that begins at `first_key` lie: box i in lane i. Boxes that are not wanted,
  // and those behind the last key, have page `pages`, of which the copy engine makes zeros: a load always has
  // the same number of bytes. Called ahead of load(), so that nobody waits for the table.
  __device__ __forceinline__ PagedRow find(int first_key) const {
    const int offset =
        min(static_cast<int>(threadIdx.x % 32) * box_rows(), kKeys);  // the sum must not overflow
    const int end = sequence_.oversized ? 0 : sequence_.seqlen_k;
    return offset < kKeys && first_key + offset < end
               ? page_table(problem_, sequence_).find(first_key + offset)
               : PagedRow{problem_.pages, 0};
  }

  // Loads what was found to `to`, in kBoxes columns of boxes, `column_elements` apart. `first_lane` has the
  // load's first box. All lanes of the warp must come.
  template <int kBoxes, int kBoxColumns, class Element>
  __device__ __forceinline__ void load(const CUtensorMap& map, cutlass::arch::ClusterTransactionBarrier& full,
                                       const PagedRow& found, int head, Element* to, int column_elements,
                                       int first_lane = 0) const {
#pragma unroll
    for (int index = 0; index < kMostBoxes; ++index) {
      if (index < boxes()) {
        const int page = __shfl_sync(0xffffffff, found.page, first_lane + index);
        const int row = __shfl_sync(0xffffffff, found.row, first_lane + index);
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

 protected:
  static constexpr int kMostBoxes = kKeys / 16;

  __device__ __forceinline__ int box_rows() const { return page_box_rows(problem_.page_size.value); }
  // Of a load; a power of two.
  __device__ __forceinline__ int boxes() const { return kKeys >> (__ffs(box_rows()) - 1); }

  const Problem& problem_;
  const Sequence& sequence_;
};

// Loads of which each begins kKeys keys before the one ahead of it. The lanes hold the boxes of as many loads
// as there are lanes for, and those of as many that follow: the table's latency is paid once for all of them.
template <int kKeys>
class PagedRun : public PagedLoads<kKeys> {
  using Base = PagedLoads<kKeys>;

 public:
  __device__ __forceinline__ PagedRun(const Problem& problem, const Sequence& sequence, int first_key)
      : Base(problem, sequence),
        first_key_(first_key),
        lane_(0),
        found_(find_batch(first_key)),
        next_(find_batch(first_key - kKeys * loads())) {}

  template <int kBoxes, int kBoxColumns, class Element>
  __device__ __forceinline__ void load(const CUtensorMap& map, cutlass::arch::ClusterTransactionBarrier& full,
                                       int head, Element* to, int column_elements) const {
    Base::template load<kBoxes, kBoxColumns>(map, full, found_, head, to, column_elements, lane_);
  }

  // To the next load.
  __device__ __forceinline__ void advance() {
    lane_ += this->boxes();
    if (lane_ == 32) {
      lane_ = 0;
      first_key_ -= kKeys * loads();
      found_ = next_;
      next_ = find_batch(first_key_ - kKeys * loads());
    }
  }

 private:
  __device__ __forceinline__ int loads() const { return 32 / this->boxes(); }  // of a batch

  __device__ __forceinline__ PagedRow find_batch(int first_key) const {
    const int lane = threadIdx.x % 32;
    const int first = first_key - lane / this->boxes() * kKeys;  // of the lane's load
    return find_box(first + lane % this->boxes() * this->box_rows(), first >= 0);
  }
  __device__ __forceinline__ PagedRow find_box(int key, bool wanted) const {
    const int end = this->sequence_.oversized ? 0 : this->sequence_.seqlen_k;
    return wanted && key < end ? page_table(this->problem_, this->sequence_).find(key)
                               : PagedRow{this->problem_.pages, 0};
  }

  int first_key_;  // of the batch's first load
  int lane_;       // that has the first box of the load
  PagedRow found_;
  PagedRow next_;
};

}  // namespace bsfa::sm90
