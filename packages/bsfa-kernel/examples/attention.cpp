// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

// Block-sparse attention from C++: prints what the library can do, runs one call where there is a GPU, and
// shows how errors are told.

#include <bsfa/bsfa.h>

#include <cstdint>
#include <cstdio>
#include <vector>

#if defined(EXAMPLE_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace {

constexpr int64_t kSeqlen = 1024;
constexpr int64_t kHeads = 4;
constexpr int64_t kHeadDim = 128;

// One sequence of contiguous [seqlen, heads, head_dim] tensors in float16, and one threshold a head.
bsfa_forward_args make_args(void* q, void* k, void* v, void* out, const float* thresholds) {
  const bsfa_strides strides{kSeqlen * kHeads * kHeadDim, kHeads * kHeadDim, kHeadDim};
  bsfa_forward_args args{};
  args.abi_version = BSFA_ABI_VERSION;
  args.struct_size = sizeof(args);
  bsfa_problem& problem = args.problem;
  problem.dtype = BSFA_FLOAT16;
  problem.rule = BSFA_RULE_ABSOLUTE;
  problem.causal = 1;
  problem.q_block = 128;
  problem.k_block = 64;
  problem.scale = 0.08838835f;  // head_dim ^ -0.5
  problem.batch = 1;
  problem.heads = kHeads;
  problem.kv_heads = kHeads;
  problem.head_dim = kHeadDim;
  problem.seqlen_q = kSeqlen;
  problem.seqlen_k = kSeqlen;
  problem.q = {q, strides};
  problem.k = {k, strides};
  args.v = {v, strides};
  args.out = {out, strides};
  args.thresholds = thresholds;
  args.threshold_rows = 1;
  return args;
}

void show_an_error() {
  bsfa_forward_args args = make_args(nullptr, nullptr, nullptr, nullptr, nullptr);
  args.problem.head_dim = 100;
  if (bsfa_forward(&args) == BSFA_INVALID_ARGUMENT) {
    std::printf("a wrong argument: %s\n", bsfa_last_error());
  }
}

#if defined(EXAMPLE_WITH_CUDA)
bool fine(cudaError_t status) {
  if (status != cudaSuccess) {
    std::printf("no forward call: %s\n", cudaGetErrorString(status));
  }
  return status == cudaSuccess;
}

// Keys of zeros: every score is 0, and a threshold above it leaves only the blocks that are always kept.
// Returns the exit status of the program.
int run_forward() {
  constexpr int64_t kBytes = kSeqlen * kHeads * kHeadDim * 2;
  constexpr int64_t kBlocks = kHeads * kSeqlen / 128;
  const std::vector<float> ones(kHeads, 1.0f);
  void* tensors = nullptr;  // q, k, v and out
  void* thresholds = nullptr;
  void* kept = nullptr;
  if (!fine(cudaMalloc(&tensors, 4 * kBytes)) || !fine(cudaMemset(tensors, 0, 4 * kBytes)) ||
      !fine(cudaMalloc(&thresholds, kHeads * sizeof(float))) ||
      !fine(cudaMemcpy(thresholds, ones.data(), kHeads * sizeof(float), cudaMemcpyHostToDevice)) ||
      !fine(cudaMalloc(&kept, kBlocks * sizeof(int32_t)))) {
    return 0;
  }

  char* data = static_cast<char*>(tensors);
  bsfa_forward_args args = make_args(data, data + kBytes, data + 2 * kBytes, data + 3 * kBytes,
                                     static_cast<const float*>(thresholds));
  args.kept = static_cast<int32_t*>(kept);
  const bsfa_status status = bsfa_forward(&args);
  if (status != BSFA_OK) {
    std::printf("bsfa_forward returned %d: %s\n", status, bsfa_last_error());
    return status == BSFA_UNSUPPORTED ? 0 : 1;
  }
  std::vector<int32_t> kept_blocks(kBlocks);
  if (!fine(cudaMemcpy(kept_blocks.data(), kept, kBlocks * sizeof(int32_t), cudaMemcpyDeviceToHost))) {
    return 1;
  }
  std::printf("forward: the last query block of head 0 kept %d of %d key blocks\n",
              kept_blocks[kSeqlen / 128 - 1], static_cast<int>(kSeqlen / 64));
  return 0;
}
#else
int run_forward() {
  std::printf("no forward call: this example was built without the CUDA toolkit\n");
  return 0;
}
#endif

}  // namespace

int main() {
  std::printf("bsfa %s, ABI %u\n%s\n", bsfa_version(), bsfa_abi_version(), bsfa_build_info());
  if (bsfa_abi_version() != BSFA_ABI_VERSION) {
    std::printf("this program was compiled for ABI %d\n", BSFA_ABI_VERSION);
    return 1;
  }
  show_an_error();
  return run_forward();
}
