// SPDX-FileCopyrightText: 2026 The BSFA developers
// SPDX-License-Identifier: BSD-3-Clause

#include "validate.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "check.hpp"

namespace bsfa {
namespace {

constexpr int64_t kMaxExtent = INT32_MAX;  // the kernels count in int32_t
constexpr int64_t kMaxTiles = (int64_t{1} << 30) - 1;
constexpr int64_t kMaxSeqlen = int64_t{1} << 30;      // ... and round lengths up to whole blocks
constexpr int64_t kAlignment = 16;                    // bytes; a thread moves no less
constexpr int64_t kRowAlignment = kAlignment / 2;     // elements; float16 and bfloat16 have two bytes
constexpr uint64_t kWorkspaceAlignment = 256;         // bytes
constexpr int64_t kWordKeys = kMaskBits * kKeyBlock;  // keys that a word of a block mask stands for
constexpr int64_t kPageMultiple = 16;                 // keys; the least that the copy engine moves at once
constexpr int64_t kMaxStride =
    (int64_t{1} << 39) - kRowAlignment;  // elements; a TMA descriptor holds 2^40 bytes

void check_range(const char* name, int64_t value, int64_t least, int64_t most) {
  BSFA_CHECK(least <= value && value <= most, name, " must be between ", least, " and ", most, ", got ",
             value);
}

void check_pointer(const char* name, const void* pointer, int64_t alignment) {
  BSFA_CHECK(pointer != nullptr, name, " must not be null");
  BSFA_CHECK(reinterpret_cast<uintptr_t>(pointer) % alignment == 0, name, " must be aligned to ", alignment,
             " bytes, and is ", reinterpret_cast<uintptr_t>(pointer) % alignment, " bytes off");
}

// What a library that is older or newer than its caller can still read: version and size come first in each
// struct.
template <class Args>
void check_version(const Args* args) {
  BSFA_CHECK(args != nullptr, "args must not be null");
  BSFA_CHECK(args->abi_version == BSFA_ABI_VERSION, "abi_version must be ", BSFA_ABI_VERSION, ", got ",
             args->abi_version, ": the caller and libbsfa come from different releases");
  BSFA_CHECK(args->struct_size == sizeof(Args), "struct_size must be ", sizeof(Args), ", got ",
             args->struct_size);
}

// Which of the arrays that say where sequences are go together. Without sequences they may be null.
void check_lengths(const bsfa_problem& args) {
  if (args.batch == 0) {
    return;
  }
  if (args.cu_seqlens_k != nullptr) {
    BSFA_CHECK(args.cu_seqlens_q != nullptr,
               "cu_seqlens_k must come with cu_seqlens_q, got only cu_seqlens_k");
    BSFA_CHECK(args.seqused_k == nullptr,
               "cu_seqlens_k and seqused_k must not both be given: keys are packed, or they are not");
    check_pointer("cu_seqlens_k", args.cu_seqlens_k, sizeof(int32_t));
  } else {
    BSFA_CHECK(args.cu_seqlens_q == nullptr || args.seqused_k != nullptr,
               "cu_seqlens_q must come with cu_seqlens_k or seqused_k, got only cu_seqlens_q");
  }
  if (args.cu_seqlens_q != nullptr) {
    check_pointer("cu_seqlens_q", args.cu_seqlens_q, sizeof(int32_t));
  }
  if (args.seqused_k != nullptr) {
    check_pointer("seqused_k", args.seqused_k, sizeof(int32_t));
  }
}

void check_pages(const bsfa_problem& args) {
  if (args.block_table == nullptr) {
    if (args.batch == 0 || args.seqlen_k == 0) {
      return;  // a table without entries may be null
    }
    const struct {
      const char* name;
      int64_t value;
    } fields[] = {{"block_table_stride", args.block_table_stride},
                  {"pages", args.pages},
                  {"page_size", args.page_size}};
    for (const auto& [name, value] : fields) {
      BSFA_CHECK(value == 0, name, " must be 0 where block_table is null, got ", value);
    }
    return;
  }
  BSFA_CHECK(args.seqused_k != nullptr,
             "block_table must come with seqused_k, which says how many keys there are, got null");
  check_pointer("block_table", args.block_table, sizeof(int32_t));
  check_range("block_table_stride", args.block_table_stride, 0, kMaxStride);
  check_range("pages", args.pages, 1, kMaxExtent);
  check_range("page_size", args.page_size, kPageMultiple, kMaxSeqlen);
  BSFA_CHECK(args.page_size % kPageMultiple == 0, "page_size must be a multiple of ", kPageMultiple, ", got ",
             args.page_size);
}

// The kernels count tiles, of no fewer than 64 queries of a head, in int32_t, with room for as many again:
// blocks that begin inside a tile and the selection take more, and loops step beyond the last.
void check_grid(int64_t sequences, int64_t heads, int64_t tiles) {
  // Each factor is below 2^32 and the first two are below 2^31, so that no product that is evaluated
  // overflows.
  const int64_t rows = sequences * heads;
  BSFA_CHECK(rows <= kMaxTiles && rows * tiles <= kMaxTiles,
             "batch * heads * ceil(seqlen_q / 64) must be at most ", kMaxTiles, ", got ", sequences, " * ",
             heads, " * ", tiles);
}

// The fields of a problem but for its tensors.
Problem check_problem(const bsfa_problem& args) {
  BSFA_CHECK(args.device >= 0, "device must be a CUDA device ordinal, 0 or more, got ", args.device);
  BSFA_CHECK(args.arch == 0 || args.arch == 80 || args.arch == 90,
             "arch must be 0 (pick by device), 80 or 90, got ", args.arch);
  BSFA_CHECK(args.dtype == BSFA_FLOAT16 || args.dtype == BSFA_BFLOAT16,
             "dtype must be 0 (float16) or 1 (bfloat16), got ", args.dtype);
  BSFA_CHECK(args.rule >= BSFA_RULE_ABSOLUTE && args.rule <= BSFA_RULE_PEAK_LSE,
             "rule must be 0 (absolute), 1 (running_max) or 2 (peak_lse), got ", args.rule);
  BSFA_CHECK(args.voters == 0 || args.voters == 1 || args.voters == 2 || args.voters == 4,
             "voters must be 1, 2 or 4 (or 0, which means 1), got ", args.voters);
  BSFA_CHECK(args.causal == 0 || args.causal == 1, "causal must be 0 or 1, got ", args.causal);
  BSFA_CHECK((args.q_block == 128 || args.q_block == 64) && args.k_block == kKeyBlock,
             "the sparsity block (q_block x k_block) must be 128x64 or 64x64, got ", args.q_block, "x",
             args.k_block);
  BSFA_CHECK(std::isfinite(args.scale) && args.scale > 0, "scale must be positive and finite, got ",
             args.scale);

  check_range("batch", args.batch, 0, kMaxExtent);
  check_range("heads", args.heads, 1, kMaxExtent);
  check_range("kv_heads", args.kv_heads, 1, kMaxExtent);
  BSFA_CHECK(args.heads % args.kv_heads == 0, "heads must be a multiple of kv_heads, got ", args.heads,
             " and ", args.kv_heads);
  BSFA_CHECK(
      args.head_dim >= kHeadDimStep && args.head_dim <= kMaxHeadDim && args.head_dim % kHeadDimStep == 0,
      "head_dim must be a multiple of ", kHeadDimStep, " up to ", kMaxHeadDim, ", got ", args.head_dim);
  check_range("seqlen_q", args.seqlen_q, 0, kMaxSeqlen);
  check_range("seqlen_k", args.seqlen_k, 0, kMaxSeqlen);

  check_lengths(args);
  check_pages(args);
  if (args.sinks != nullptr) {
    check_pointer("sinks", args.sinks, sizeof(float));
  }
  if (args.cu_seqlens_q != nullptr) {
    const bool has_keys = args.cu_seqlens_k != nullptr && args.seqlen_k > 0;
    BSFA_CHECK(args.batch >= 1 || (args.seqlen_q == 0 && !has_keys),
               "batch must be at least 1 where cu_seqlens are given and there are queries or keys, got 0");
    check_grid(1, args.heads, args.seqlen_q / 64 + 2 * args.batch);
  } else {
    const int64_t spare = args.seqused_k != nullptr && args.seqlen_q > 0 ? 2 : 0;
    check_grid(args.batch, args.heads, (args.seqlen_q + 63) / 64 + spare);
  }

  Problem problem{};
  problem.batch = static_cast<int32_t>(args.batch);
  problem.heads = static_cast<int32_t>(args.heads);
  problem.kv_heads = static_cast<int32_t>(args.kv_heads);
  problem.head_dim = static_cast<int32_t>(args.head_dim);
  problem.seqlen_q = static_cast<int32_t>(args.seqlen_q);
  problem.seqlen_k = static_cast<int32_t>(args.seqlen_k);
  problem.scale = args.scale;
  problem.rule = static_cast<Rule>(args.rule);
  problem.causal = args.causal != 0;
  problem.voters = args.voters == 0 ? 1 : args.voters;
  problem.q_block = args.q_block;
  problem.cu_seqlens_q = args.cu_seqlens_q;
  problem.cu_seqlens_k = args.cu_seqlens_k;
  problem.seqused_k = args.seqused_k;
  problem.sinks = args.sinks;
  if (args.block_table != nullptr) {
    problem.block_table = args.block_table;
    problem.block_table_stride = args.block_table_stride;
    problem.pages = static_cast<int32_t>(args.pages);
    problem.page_size = Divisor::of(args.page_size);
  }
  return problem;
}

// A tensor of the caller, with its shape.
struct Tensor {
  const char* name;
  const void* data;
  bsfa_strides strides;
  int64_t batch;  // 1 where packed; of keys in pages, their number
  int64_t seqlen;
  int64_t heads;
  int64_t head_dim;
  const char* first;  // dimension's name, for messages
};

Tensor like_queries(const char* name, const bsfa_tensor& tensor, const bsfa_problem& args) {
  const int64_t batch = args.cu_seqlens_q != nullptr ? 1 : args.batch;
  return {name, tensor.data, tensor.strides, batch, args.seqlen_q, args.heads, args.head_dim, "batch"};
}

Tensor like_keys(const char* name, const bsfa_tensor& tensor, const bsfa_problem& args) {
  if (args.block_table != nullptr) {
    return {name,           tensor.data,   tensor.strides, args.pages,
            args.page_size, args.kv_heads, args.head_dim,  "pages"};
  }
  const int64_t batch = args.cu_seqlens_k != nullptr ? 1 : args.batch;
  return {name, tensor.data, tensor.strides, batch, args.seqlen_k, args.kv_heads, args.head_dim, "batch"};
}

// Checks one tensor and returns its strides; those of dimensions that have one entry, which mean nothing, as
// if it were contiguous.
Strides check_tensor(const Tensor& tensor) {
  check_pointer(tensor.name, tensor.data, kAlignment);
  const struct {
    const char* name;
    int64_t extent;
    int64_t stride;
  } dimensions[] = {{tensor.first, tensor.batch, tensor.strides.batch},
                    {"seqlen", tensor.seqlen, tensor.strides.seqlen},
                    {"heads", tensor.heads, tensor.strides.heads}};
  for (const auto& [name, extent, stride] : dimensions) {
    if (extent > 1) {
      BSFA_CHECK(stride >= 0 && stride <= kMaxStride && stride % kRowAlignment == 0, "the ", name,
                 " stride of ", tensor.name, " must be a multiple of ", kRowAlignment, " elements (",
                 kAlignment, " bytes) between 0 and ", kMaxStride, ", got ", stride);
      BSFA_CHECK(stride <= (int64_t{1} << 59) / extent, tensor.name, " must span less than 2^60 bytes, got ",
                 extent, " entries with ", name, " stride ", stride);
    }
  }
  const int64_t heads = tensor.heads > 1 ? tensor.strides.heads : tensor.head_dim;
  const int64_t seqlen = tensor.seqlen > 1 ? tensor.strides.seqlen : tensor.heads * tensor.head_dim;
  return {tensor.batch > 1 ? tensor.strides.batch : 0, seqlen, heads};
}

// Two entries of an output must not share an element: whatever the order of the dimensions, each must step
// over all that the smaller ones span.
void check_distinct(const Tensor& tensor) {
  struct Dimension {
    int64_t stride;
    int64_t extent;
  };
  std::array dimensions{Dimension{tensor.strides.batch, tensor.batch},
                        Dimension{tensor.strides.seqlen, tensor.seqlen},
                        Dimension{tensor.strides.heads, tensor.heads}};
  std::sort(dimensions.begin(), dimensions.end(),
            [](const Dimension& left, const Dimension& right) { return left.stride < right.stride; });
  int64_t span = tensor.head_dim;
  for (const Dimension& dimension : dimensions) {
    if (dimension.extent > 1) {
      BSFA_CHECK(dimension.stride >= span, "the strides of ", tensor.name,
                 " must keep its entries apart, got batch ", tensor.strides.batch, ", seqlen ",
                 tensor.strides.seqlen, ", heads ", tensor.strides.heads, " for ", tensor.batch, " x ",
                 tensor.seqlen, " x ", tensor.heads, " rows of ", tensor.head_dim);
      span += dimension.stride * (dimension.extent - 1);
    }
  }
}

// The queries, which there are, and the keys if there are any.
void check_operands(const bsfa_problem& args, Problem& problem) {
  problem.q = args.q.data;
  problem.q_strides = check_tensor(like_queries("q", args.q, args));
  if (problem.seqlen_k > 0) {
    problem.k = args.k.data;
    problem.k_strides = check_tensor(like_keys("k", args.k, args));
  }
}

// The thresholds' number of rows, as the kernels have it.
int32_t check_threshold_rows(int64_t rows, int64_t least) {
  check_range("threshold_rows", rows, least, kMaxExtent);
  return static_cast<int32_t>(rows);
}

// The number of words in a row of a block mask. Only the device knows the longest of packed sequences. Where
// keys lie in pages, a mask may be for more of them than there are.
int32_t check_mask_words(const bsfa_problem& args, int64_t words) {
  const int64_t most = (args.seqlen_k + kWordKeys - 1) / kWordKeys;
  if (args.cu_seqlens_k != nullptr) {
    check_range("mask_words", words, std::min<int64_t>(most, 1), kMaxSeqlen / kWordKeys);
  } else if (args.block_table != nullptr) {
    check_range("mask_words", words, most, kMaxSeqlen / kWordKeys);
  } else {
    BSFA_CHECK(words == most, "mask_words must be ceil(seqlen_k / ", kWordKeys, "), ", most, ", got ", words);
  }
  return static_cast<int32_t>(words);
}

bool has_queries(const bsfa_problem& args) {
  return args.batch > 0 && args.seqlen_q > 0;
}

// The tensors of a call that has queries, beyond q and k.
void check_outputs(const bsfa_problem& problem, const bsfa_tensor& v, const bsfa_tensor& out,
                   ForwardParams& params) {
  check_operands(problem, params);
  const Tensor written = like_queries("out", out, problem);
  params.out = out.data;
  params.out_strides = check_tensor(written);
  check_distinct(written);
  if (params.seqlen_k > 0) {
    params.v = v.data;
    params.v_strides = check_tensor(like_keys("v", v, problem));
    BSFA_CHECK(params.out != params.q && params.out != params.k && params.out != params.v,
               "out must not be one of the inputs: blocks of it are written while others are still read");
  }
}

int32_t* check_kept(int32_t* kept) {
  if (kept != nullptr) {
    check_pointer("kept", kept, sizeof(int32_t));
  }
  return kept;
}

float* check_lse(float* lse) {
  if (lse != nullptr) {
    check_pointer("lse", lse, sizeof(float));
  }
  return lse;
}

}  // namespace

void check_workspace(const void* workspace, uint64_t bytes, uint64_t needed) {
  if (needed == 0) {
    return;
  }
  BSFA_CHECK(workspace != nullptr, "workspace must not be null: this call needs ", needed, " bytes");
  BSFA_CHECK(reinterpret_cast<uintptr_t>(workspace) % kWorkspaceAlignment == 0,
             "workspace must be aligned to ", kWorkspaceAlignment, " bytes, and is ",
             reinterpret_cast<uintptr_t>(workspace) % kWorkspaceAlignment, " bytes off");
  BSFA_CHECK(bytes >= needed, "workspace_bytes must be at least ", needed, ", got ", bytes);
}

ForwardParams validate(const bsfa_forward_args* pointer) {
  check_version(pointer);
  const bsfa_forward_args& args = *pointer;
  const bsfa_problem& problem = args.problem;
  ForwardParams params{};
  static_cast<Problem&>(params) = check_problem(problem);
  params.threshold_rows = check_threshold_rows(args.threshold_rows, 1);
  params.kept = check_kept(args.kept);
  if (!has_queries(problem)) {
    return params;  // the tensors have no data, and nothing says where they are
  }
  check_outputs(problem, args.v, args.out, params);
  check_pointer("thresholds", args.thresholds, sizeof(float));
  params.thresholds = args.thresholds;
  params.lse = check_lse(args.lse);
  return params;
}

BlockMaximaParams validate(const bsfa_block_maxima_args* pointer) {
  check_version(pointer);
  const bsfa_block_maxima_args& args = *pointer;
  const bsfa_problem& problem = args.problem;
  BlockMaximaParams params{};
  static_cast<Problem&>(params) = check_problem(problem);
  BSFA_CHECK_SUPPORTED(problem.cu_seqlens_q == nullptr,
                       "block maxima are not made of packed sequences: cu_seqlens_q must be null");
  if (problem.batch == 0 || params.query_blocks(params.q_block) == 0 || problem.seqlen_k == 0) {
    return params;  // no block
  }
  if (has_queries(problem)) {
    check_operands(problem, params);
  }
  check_pointer("maxima", args.maxima, sizeof(float));
  params.maxima = args.maxima;
  return params;
}

SelectParams validate_shape(const bsfa_select_blocks_args* pointer) {
  check_version(pointer);
  const bsfa_select_blocks_args& args = *pointer;
  SelectParams params{};
  static_cast<Problem&>(params) = check_problem(args.problem);
  BSFA_CHECK(args.precision == BSFA_PRECISION_EXACT || args.precision == BSFA_PRECISION_INT8,
             "precision must be 0 (exact) or 1 (int8), got ", args.precision);
  params.precision = static_cast<Precision>(args.precision);
  constexpr int64_t kMaxRoundedHeads = 65535;  // a dimension of a grid
  BSFA_CHECK(params.precision == Precision::kExact || args.problem.kv_heads <= kMaxRoundedHeads,
             "kv_heads must be at most ", kMaxRoundedHeads, " for precision 1 (int8), got ",
             args.problem.kv_heads);
  params.threshold_rows = check_threshold_rows(args.threshold_rows, 1);
  params.mask_words = check_mask_words(args.problem, args.mask_words);
  return params;
}

SelectParams validate(const bsfa_select_blocks_args* pointer) {
  SelectParams params = validate_shape(pointer);
  const bsfa_select_blocks_args& args = *pointer;
  if (args.problem.batch > 0 && params.query_blocks(params.q_block) > 0 && params.mask_words > 0) {
    check_pointer("block_mask", args.block_mask, sizeof(uint64_t));
    params.block_mask = args.block_mask;
  }
  if (!has_queries(args.problem)) {
    return params;
  }
  check_operands(args.problem, params);
  check_pointer("thresholds", args.thresholds, sizeof(float));
  params.thresholds = args.thresholds;
  params.workspace = args.workspace;
  return params;
}

AttendParams validate_shape(const bsfa_attend_blocks_args* pointer) {
  check_version(pointer);
  const bsfa_attend_blocks_args& args = *pointer;
  AttendParams params{};
  static_cast<Problem&>(params) = check_problem(args.problem);
  params.threshold_rows = check_threshold_rows(args.threshold_rows, 0);
  BSFA_CHECK((args.thresholds == nullptr) == (args.threshold_rows == 0),
             "threshold_rows must be 0 where thresholds is null, and only there, got ", args.threshold_rows);
  params.mask_words = check_mask_words(args.problem, args.mask_words);
  return params;
}

AttendParams validate(const bsfa_attend_blocks_args* pointer) {
  AttendParams params = validate_shape(pointer);
  const bsfa_attend_blocks_args& args = *pointer;
  params.kept = check_kept(args.kept);
  if (!has_queries(args.problem)) {
    return params;
  }
  check_outputs(args.problem, args.v, args.out, params);
  if (params.mask_words > 0) {
    check_pointer("block_mask", args.block_mask, sizeof(uint64_t));
    params.block_mask = args.block_mask;
  }
  if (args.thresholds != nullptr) {
    check_pointer("thresholds", args.thresholds, sizeof(float));
    params.thresholds = args.thresholds;
  }
  params.lse = check_lse(args.lse);
  params.workspace = args.workspace;
  return params;
}

}  // namespace bsfa
