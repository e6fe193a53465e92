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

static void print_forward_args(void) {
  STRUCT(bsfa_forward_args);
  MEMBER(bsfa_forward_args, abi_version);
  MEMBER(bsfa_forward_args, struct_size);
  MEMBER(bsfa_forward_args, device);
  MEMBER(bsfa_forward_args, arch);
  MEMBER(bsfa_forward_args, stream);
  MEMBER(bsfa_forward_args, dtype);
  MEMBER(bsfa_forward_args, rule);
  MEMBER(bsfa_forward_args, causal);
  MEMBER(bsfa_forward_args, q_block);
  MEMBER(bsfa_forward_args, k_block);
  MEMBER(bsfa_forward_args, scale);
  MEMBER(bsfa_forward_args, batch);
  MEMBER(bsfa_forward_args, heads);
  MEMBER(bsfa_forward_args, kv_heads);
  MEMBER(bsfa_forward_args, head_dim);
  MEMBER(bsfa_forward_args, seqlen_q);
  MEMBER(bsfa_forward_args, seqlen_k);
  MEMBER(bsfa_forward_args, q);
  MEMBER(bsfa_forward_args, k);
  MEMBER(bsfa_forward_args, v);
  MEMBER(bsfa_forward_args, out);
  MEMBER(bsfa_forward_args, q_strides);
  MEMBER(bsfa_forward_args, k_strides);
  MEMBER(bsfa_forward_args, v_strides);
  MEMBER(bsfa_forward_args, out_strides);
  MEMBER(bsfa_forward_args, thresholds);
  MEMBER(bsfa_forward_args, threshold_rows);
  MEMBER(bsfa_forward_args, cu_seqlens_q);
  MEMBER(bsfa_forward_args, cu_seqlens_k);
  MEMBER(bsfa_forward_args, lse);
  MEMBER(bsfa_forward_args, kept);
}

static void print_block_maxima_args(void) {
  STRUCT(bsfa_block_maxima_args);
  MEMBER(bsfa_block_maxima_args, abi_version);
  MEMBER(bsfa_block_maxima_args, struct_size);
  MEMBER(bsfa_block_maxima_args, device);
  MEMBER(bsfa_block_maxima_args, arch);
  MEMBER(bsfa_block_maxima_args, stream);
  MEMBER(bsfa_block_maxima_args, dtype);
  MEMBER(bsfa_block_maxima_args, rule);
  MEMBER(bsfa_block_maxima_args, causal);
  MEMBER(bsfa_block_maxima_args, q_block);
  MEMBER(bsfa_block_maxima_args, k_block);
  MEMBER(bsfa_block_maxima_args, scale);
  MEMBER(bsfa_block_maxima_args, batch);
  MEMBER(bsfa_block_maxima_args, heads);
  MEMBER(bsfa_block_maxima_args, kv_heads);
  MEMBER(bsfa_block_maxima_args, head_dim);
  MEMBER(bsfa_block_maxima_args, seqlen_q);
  MEMBER(bsfa_block_maxima_args, seqlen_k);
  MEMBER(bsfa_block_maxima_args, q);
  MEMBER(bsfa_block_maxima_args, k);
  MEMBER(bsfa_block_maxima_args, q_strides);
  MEMBER(bsfa_block_maxima_args, k_strides);
  MEMBER(bsfa_block_maxima_args, maxima);
}

int main(void) {
  print_strides();
  print_forward_args();
  print_block_maxima_args();
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
  CONSTANT(BSFA_RULE_RUNNING_LSE);
  return 0;
}
