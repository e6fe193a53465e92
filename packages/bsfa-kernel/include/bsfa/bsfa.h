/* SPDX-FileCopyrightText: 2026 The BSFA developers
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Block-sparse attention for long prompts: the C interface of libbsfa.
 *
 * What the functions compute is written in docs/semantics.md, how they are called in docs/abi.md. All
 * pointers in the argument structs are device pointers, those to 16-bit tensors aligned to 16 bytes; strides
 * are in elements, multiples of 8, and that of head_dim is 1. Nothing here allocates device memory or
 * synchronises, so that every call can be captured in a CUDA graph.
 */
#ifndef BSFA_BSFA_H_
#define BSFA_BSFA_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define BSFA_API __declspec(dllexport)
#else
#define BSFA_API __attribute__((visibility("default")))
#endif

/* Raised when a struct or a function changes in a way that a caller can notice. */
#define BSFA_ABI_VERSION 1

typedef enum bsfa_status {
  BSFA_OK = 0,
  BSFA_INVALID_ARGUMENT = 1, /* the arguments break a rule; bsfa_last_error() names rule and value */
  BSFA_UNSUPPORTED = 2,      /* valid, but not by this build or on this GPU */
  BSFA_CUDA_ERROR = 3,       /* a CUDA call or launch failed */
  BSFA_INTERNAL_ERROR = 4,   /* a defect of the library */
} bsfa_status;

typedef enum bsfa_dtype {
  BSFA_FLOAT16 = 0,
  BSFA_BFLOAT16 = 1,
} bsfa_dtype;

typedef enum bsfa_rule {
  BSFA_RULE_ABSOLUTE = 0,
  BSFA_RULE_RUNNING_MAX = 1,
  BSFA_RULE_PEAK_LSE = 2,
} bsfa_rule;

/* Of the scores that are compared with thresholds. */
typedef enum bsfa_precision {
  BSFA_PRECISION_EXACT = 0, /* products of dtype, summed in float32 */
  BSFA_PRECISION_INT8 = 1,  /* q and k rounded to 8 bits */
} bsfa_precision;

/* Strides of a [batch, seqlen, heads, head_dim] tensor, in elements. For packed (varlen) tensors, batch
 * is ignored. Of keys and values in pages, batch is the stride of pages and seqlen that of tokens. */
typedef struct bsfa_strides {
  int64_t batch;
  int64_t seqlen;
  int64_t heads;
} bsfa_strides;

/* A tensor whose head_dim stride is 1. The data of an input are only read. */
typedef struct bsfa_tensor {
  void* data;
  bsfa_strides strides;
} bsfa_tensor;

/* What every function is told: where to run, the shape, the rule, the queries and the keys. */
typedef struct bsfa_problem {
  int32_t device; /* CUDA device ordinal of all pointers */
  int32_t arch;   /* kernel to use: 0 picks by device, 80 or 90 insists */
  void* stream;   /* cudaStream_t */

  int32_t dtype;   /* bsfa_dtype of q, k, v and out */
  int32_t rule;    /* bsfa_rule */
  int32_t causal;  /* 0 or 1; aligned to the bottom right */
  int32_t q_block; /* sparsity block: 128 or 64 queries ... */
  int32_t k_block; /* ... by 64 keys */
  float scale;     /* > 0, finite */
  int32_t voters;  /* one query row in 1, 2 or 4 votes; 0 means 1 */

  int64_t batch;
  int64_t heads;
  int64_t kv_heads; /* divides heads */
  int64_t head_dim; /* a multiple of 8 up to 256, of v too */
  int64_t seqlen_q; /* packed: total_q, the number of packed queries */
  int64_t seqlen_k; /* packed: total_k, the number of packed keys; in pages: the most keys that a sequence
                     * may have, no more than its row of the block table has room for */

  bsfa_tensor q; /* [batch, seqlen_q, heads, head_dim], packed: [total_q, heads, head_dim] */
  bsfa_tensor k; /* [batch, seqlen_k, kv_heads, head_dim], packed: [total_k, kv_heads, head_dim], in pages:
                  * [pages, page_size, kv_heads, head_dim] */

  const int32_t* cu_seqlens_q; /* [batch + 1], or NULL where queries are not packed */
  const int32_t* cu_seqlens_k; /* [batch + 1], or NULL where keys are not packed; only with cu_seqlens_q */
  const int32_t* seqused_k;    /* [batch]: how many keys of each sequence there are, or NULL; not with
                                * cu_seqlens_k. Without it, cu_seqlens_q needs cu_seqlens_k */

  /* Keys in pages. All are 0 where they are not. */
  const int32_t* block_table; /* [batch, ...]: the page of each page_size keys of a sequence, as far as its
                               * seqused_k goes, which must be given */
  int64_t block_table_stride; /* of its rows, in elements */
  int64_t pages;              /* that k and v hold */
  int32_t page_size;          /* keys of a page, a multiple of 16 */

  const float* sinks; /* [heads], units of scaled scores: a score of each head that takes part in the softmax
                       * of its rows and has no value; or NULL */
} bsfa_problem;

/* Arguments of bsfa_forward. Set abi_version and struct_size first; zero means "absent" everywhere else. */
typedef struct bsfa_forward_args {
  uint32_t abi_version; /* BSFA_ABI_VERSION */
  uint32_t struct_size; /* sizeof(bsfa_forward_args) */
  bsfa_problem problem;

  bsfa_tensor v;   /* as k */
  bsfa_tensor out; /* as q */

  const float* thresholds; /* [heads, threshold_rows], contiguous */
  int64_t threshold_rows;  /* >= 1 */

  float* lse;    /* [batch, heads, seqlen_q], packed: [heads, total_q]; or NULL */
  int32_t* kept; /* [batch, heads, columns], packed: [heads, columns], all of which is written, 0 where a
                  * column belongs to no query block; or NULL. How many columns: docs/semantics.md */
} bsfa_forward_args;

/* Arguments of bsfa_block_maxima, which takes no packed queries. */
typedef struct bsfa_block_maxima_args {
  uint32_t abi_version; /* BSFA_ABI_VERSION */
  uint32_t struct_size; /* sizeof(bsfa_block_maxima_args) */
  bsfa_problem problem;

  float* maxima; /* [batch, heads, columns, k_blocks], contiguous; every element is written */
} bsfa_block_maxima_args;

/* A block mask: uint64 [batch, heads, columns, words], packed [heads, columns, words], with the columns of
 * kept, contiguous. Bit j of word i stands for key block 64 * i + j. */

/* Arguments of bsfa_select_blocks. */
typedef struct bsfa_select_blocks_args {
  uint32_t abi_version; /* BSFA_ABI_VERSION */
  uint32_t struct_size; /* sizeof(bsfa_select_blocks_args) */
  bsfa_problem problem;

  const float* thresholds; /* [heads, threshold_rows], contiguous */
  int64_t threshold_rows;  /* >= 1 */

  int32_t precision;    /* bsfa_precision */
  uint64_t* block_mask; /* all of it is written */
  int64_t mask_words;   /* ceil(seqlen_k / 4096); packed keys: of the longest sequence */

  void* workspace;          /* device memory, aligned to 256 bytes; its contents mean nothing between calls */
  uint64_t workspace_bytes; /* at least what bsfa_select_blocks_workspace() says */
} bsfa_select_blocks_args;

/* Arguments of bsfa_attend_blocks. Of the problem, rule and voters are checked and not used. */
typedef struct bsfa_attend_blocks_args {
  uint32_t abi_version; /* BSFA_ABI_VERSION */
  uint32_t struct_size; /* sizeof(bsfa_attend_blocks_args) */
  bsfa_problem problem;

  bsfa_tensor v;   /* as k */
  bsfa_tensor out; /* as q */

  const uint64_t* block_mask; /* which of the visible key blocks count; other bits are ignored */
  int64_t mask_words;         /* ceil(seqlen_k / 4096); packed keys: of the longest sequence */

  const float* thresholds; /* [heads, threshold_rows] that the mask was made with, or NULL: query blocks
                            * whose threshold is NaN get NaN */
  int64_t threshold_rows;  /* >= 1, or 0 where thresholds is NULL */

  float* lse;    /* as in bsfa_forward_args */
  int32_t* kept; /* as in bsfa_forward_args */

  void* workspace;          /* device memory, aligned to 256 bytes; its contents mean nothing between calls */
  uint64_t workspace_bytes; /* at least what bsfa_attend_blocks_workspace() says */
} bsfa_attend_blocks_args;

/* Attention that leaves out the key blocks whose scores stay below a threshold. */
BSFA_API bsfa_status bsfa_forward(const bsfa_forward_args* args);

/* The quantity that bsfa_forward compares with the thresholds, for every block. */
BSFA_API bsfa_status bsfa_block_maxima(const bsfa_block_maxima_args* args);

/* The blocks that bsfa_forward would keep, as a mask; those whose excess is within rounding of the
 * threshold, with 8-bit scores within their error, may differ. */
BSFA_API bsfa_status bsfa_select_blocks(const bsfa_select_blocks_args* args);

/* Attention over the key blocks of a mask. */
BSFA_API bsfa_status bsfa_attend_blocks(const bsfa_attend_blocks_args* args);

/* How many bytes of workspace the call needs. Pointers to tensors and workspace are not read. */
BSFA_API bsfa_status bsfa_select_blocks_workspace(const bsfa_select_blocks_args* args, uint64_t* bytes);
BSFA_API bsfa_status bsfa_attend_blocks_workspace(const bsfa_attend_blocks_args* args, uint64_t* bytes);

/* "major.minor.patch" of the library. */
BSFA_API const char* bsfa_version(void);

/* BSFA_ABI_VERSION that the library was built with. */
BSFA_API uint32_t bsfa_abi_version(void);

/* A JSON object that describes the build: version, abi_version, cuda (version of the toolkit, or null), and
 * kernels: a list of {"name": "forward" | "block_maxima" | "select_blocks" | "attend_blocks", "arch", "ptx",
 * "dtype", "head_dim", "head_dims", "geometries"}: head_dims are those that the kernel serves, of which
 * head_dim is the largest. */
BSFA_API const char* bsfa_build_info(void);

/* What went wrong in this thread's last call that did not return BSFA_OK; "" if none did. Valid until the
 * next failure in this thread. */
BSFA_API const char* bsfa_last_error(void);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* BSFA_BSFA_H_ */
