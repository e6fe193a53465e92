/* SPDX-FileCopyrightText: 2026 The BSFA developers
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * Prints the layout of every struct and the value of every constant of bsfa.h as this compiler sees them: one
 * line "struct size", "struct.member offset size" or "constant value" each.
 */
#include <bsfa/bsfa.h>
#include <stdio.h>

#define STRUCT(type) printf("%s %zu\n", #type, sizeof(type))
#define MEMBER(type, member) \
  printf("%s.%s %zu %zu\n", #type, #member, offsetof(type, member), sizeof(((type*)0)->member))
#define CONSTANT(name) printf("%s %d\n", #name, (int)(name))

static void print_strides(void) {
  STRUCT(bsfa_strides);
  MEMBER(bsfa_strides, batch);
  MEMBER(bsfa_strides, seqlen);
  MEMBER(bsfa_strides, heads);
}

static void print_tensor(void) {
  STRUCT(bsfa_tensor);
  MEMBER(bsfa_tensor, data);
  MEMBER(bsfa_tensor, strides);
}

static void print_problem(void) {
  STRUCT(bsfa_problem);
  MEMBER(bsfa_problem, device);
  MEMBER(bsfa_problem, arch);
  MEMBER(bsfa_problem, stream);
  MEMBER(bsfa_problem, dtype);
  MEMBER(bsfa_problem, rule);
  MEMBER(bsfa_problem, causal);
  MEMBER(bsfa_problem, q_block);
  MEMBER(bsfa_problem, k_block);
  MEMBER(bsfa_problem, scale);
  MEMBER(bsfa_problem, voters);
  MEMBER(bsfa_problem, batch);
  MEMBER(bsfa_problem, heads);
  MEMBER(bsfa_problem, kv_heads);
  MEMBER(bsfa_problem, head_dim);
  MEMBER(bsfa_problem, seqlen_q);
  MEMBER(bsfa_problem, seqlen_k);
  MEMBER(bsfa_problem, q);
  MEMBER(bsfa_problem, k);
  MEMBER(bsfa_problem, cu_seqlens_q);
  MEMBER(bsfa_problem, cu_seqlens_k);
  MEMBER(bsfa_problem, seqused_k);
  MEMBER(bsfa_problem, block_table);
  MEMBER(bsfa_problem, block_table_stride);
  MEMBER(bsfa_problem, pages);
  MEMBER(bsfa_problem, page_size);
  MEMBER(bsfa_problem, sinks);
}

static void print_forward_args(void) {
  STRUCT(bsfa_forward_args);
  MEMBER(bsfa_forward_args, abi_version);
  MEMBER(bsfa_forward_args, struct_size);
  MEMBER(bsfa_forward_args, problem);
  MEMBER(bsfa_forward_args, v);
  MEMBER(bsfa_forward_args, out);
  MEMBER(bsfa_forward_args, thresholds);
  MEMBER(bsfa_forward_args, threshold_rows);
  MEMBER(bsfa_forward_args, lse);
  MEMBER(bsfa_forward_args, kept);
}

static void print_block_maxima_args(void) {
  STRUCT(bsfa_block_maxima_args);
  MEMBER(bsfa_block_maxima_args, abi_version);
  MEMBER(bsfa_block_maxima_args, struct_size);
  MEMBER(bsfa_block_maxima_args, problem);
  MEMBER(bsfa_block_maxima_args, maxima);
}

static void print_select_blocks_args(void) {
  STRUCT(bsfa_select_blocks_args);
  MEMBER(bsfa_select_blocks_args, abi_version);
  MEMBER(bsfa_select_blocks_args, struct_size);
  MEMBER(bsfa_select_blocks_args, problem);
  MEMBER(bsfa_select_blocks_args, thresholds);
  MEMBER(bsfa_select_blocks_args, threshold_rows);
  MEMBER(bsfa_select_blocks_args, precision);
  MEMBER(bsfa_select_blocks_args, block_mask);
  MEMBER(bsfa_select_blocks_args, mask_words);
  MEMBER(bsfa_select_blocks_args, workspace);
  MEMBER(bsfa_select_blocks_args, workspace_bytes);
}

static void print_attend_blocks_args(void) {
  STRUCT(bsfa_attend_blocks_args);
  MEMBER(bsfa_attend_blocks_args, abi_version);
  MEMBER(bsfa_attend_blocks_args, struct_size);
  MEMBER(bsfa_attend_blocks_args, problem);
  MEMBER(bsfa_attend_blocks_args, v);
  MEMBER(bsfa_attend_blocks_args, out);
  MEMBER(bsfa_attend_blocks_args, block_mask);
  MEMBER(bsfa_attend_blocks_args, mask_words);
  MEMBER(bsfa_attend_blocks_args, thresholds);
  MEMBER(bsfa_attend_blocks_args, threshold_rows);
  MEMBER(bsfa_attend_blocks_args, lse);
  MEMBER(bsfa_attend_blocks_args, kept);
  MEMBER(bsfa_attend_blocks_args, workspace);
  MEMBER(bsfa_attend_blocks_args, workspace_bytes);
}

int main(void) {
  print_strides();
  print_tensor();
  print_problem();
  print_forward_args();
  print_block_maxima_args();
  print_select_blocks_args();
  print_attend_blocks_args();
  CONSTANT(BSFA_ABI_VERSION);
  CONSTANT(BSFA_OK);
  CONSTANT(BSFA_INVALID_ARGUMENT);
  CONSTANT(BSFA_UNSUPPORTED);
  CONSTANT(BSFA_CUDA_ERROR);
  CONSTANT(BSFA_INTERNAL_ERROR);
  CONSTANT(BSFA_FLOAT16);
  CONSTANT(BSFA_BFLOAT16);
  CONSTANT(BSFA_RULE_ABSOLUTE);
  CONSTANT(BSFA_RULE_RUNNING_MAX);
  CONSTANT(BSFA_RULE_PEAK_LSE);
  CONSTANT(BSFA_PRECISION_EXACT);
  CONSTANT(BSFA_PRECISION_INT8);
  return 0;
}
