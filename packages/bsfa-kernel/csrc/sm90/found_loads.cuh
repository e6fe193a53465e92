// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// One warp finds where blocks of 64 keys lie, a batch at a time and some batches ahead of the threads that
// load K and V, which so wait for no table. What was found passes through shared memory.
#pragma once

#include "barriers.cuh"
#include "key_pages.cuh"

namespace bsfa::sm90 {

// By one thread, before anything else happens in the CTA. `loaders`: threads that load.
__device__ __forceinline__ void initialize_found(FoundBoxes& found, int loaders) {
  for (int stage = 0; stage < FoundBoxes::kStages; ++stage) {
    found.full[stage].init(FoundBoxes::kBoxes);  // each lane has a box
    found.empty[stage].init(loaders);
  }
}

// A lane of the warp that finds boxes.
class BoxFinder {
 public:
  __device__ __forceinline__ BoxFinder(FoundBoxes& found, const Problem& problem)
      : found_(found), bits_(boxes_bits<kKeyBlock>(problem)) {}

  // Blocks that are found at a time; of these, the lane's, and the lane's row of it.
  __device__ __forceinline__ int blocks() const { return FoundBoxes::kBoxes >> bits_; }
  __device__ __forceinline__ int block() const { return lane() >> bits_; }
  __device__ __forceinline__ int row() const { return (lane() & ((1 << bits_) - 1)) * (kKeyBlock >> bits_); }

  // All lanes of the warp must come.
  __device__ __forceinline__ void publish(const PagedRow& box) {
    const int stage = state_.stage();
    wait(found_.empty[stage], state_.phase() ^ 1);
    found_.boxes[stage][lane()] = box;
    keep_order();
    found_.full[stage].arrive();
    state_.advance();
  }

 private:
  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }

  FoundBoxes& found_;
  PipelineState<FoundBoxes::kStages> state_;
  int bits_;
};

// Loads the blocks of a tile in the order in which they were found. By one thread.
template <class Config>
class FoundLoads {
 public:
  // `state`: the thread's own, from tile to tile.
  __device__ __forceinline__ FoundLoads(FoundBoxes& found, PipelineState<FoundBoxes::kStages>& state,
                                        const Problem& problem, int kv_head)
      : found_(found), state_(state), bits_(boxes_bits<kKeyBlock>(problem)), kv_head_(kv_head), box_(0) {}

  // Before load().
  __device__ __forceinline__ void find() const {
    if (box_ == 0) {
      wait(found_.full[state_.stage()], state_.phase());
    }
  }
  __device__ __forceinline__ void load(const CUtensorMap& map, cutlass::arch::ClusterTransactionBarrier& full,
                                       typename Config::Element* to, int column_elements) const {
    full.arrive_and_expect_tx(Config::kBlockBytes);
    // Known numbers of boxes: small ones come so fast that addresses would take too long.
    if (bits_ == 0) {
      load_boxes<1>(map, full, to, column_elements);
    } else if (bits_ == 1) {
      load_boxes<2>(map, full, to, column_elements);
    } else {
      load_boxes<4>(map, full, to, column_elements);
    }
  }
  // After each block, loaded or not.
  __device__ __forceinline__ void advance(bool is_last_of_tile) {
    box_ += 1 << bits_;
    if (box_ == FoundBoxes::kBoxes || is_last_of_tile) {
      keep_order();
      found_.empty[state_.stage()].arrive();
      state_.advance();
      box_ = 0;
    }
  }

 private:
  template <int kNumber>
  __device__ __forceinline__ void load_boxes(const CUtensorMap& map,
                                             cutlass::arch::ClusterTransactionBarrier& full,
                                             typename Config::Element* to, int column_elements) const {
    const PagedRow* first = found_.boxes[state_.stage()] + box_;
#pragma unroll
    for (int i = 0; i < kNumber; ++i) {
      const PagedRow box = first[i];
      load_box<Config::kBoxes, Config::kBoxColumns>(
          map, full, box, kv_head_, to + i * (Config::kBoxElements / kNumber), column_elements);
    }
  }

  FoundBoxes& found_;
  PipelineState<FoundBoxes::kStages>& state_;
  int bits_;
  int kv_head_;
  int box_;  // of the stage's boxes, the block's first
};

}  // namespace bsfa::sm90
