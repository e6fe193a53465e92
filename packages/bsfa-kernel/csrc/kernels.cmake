# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause

# Every kernel of the library: a line here, and a file in instantiations/. The options say which of them are built.

bsfa_add_kernel(bsfa forward 80 float16 64 csrc/sm80/instantiations/half_64.cu)
bsfa_add_kernel(bsfa forward 80 float16 128 csrc/sm80/instantiations/half_128.cu)
bsfa_add_kernel(bsfa forward 80 float16 256 csrc/sm80/instantiations/half_256.cu)
bsfa_add_kernel(bsfa forward 80 bfloat16 64 csrc/sm80/instantiations/bfloat16_64.cu)
bsfa_add_kernel(bsfa forward 80 bfloat16 128 csrc/sm80/instantiations/bfloat16_128.cu)
bsfa_add_kernel(bsfa forward 80 bfloat16 256 csrc/sm80/instantiations/bfloat16_256.cu)

bsfa_add_kernel(bsfa forward 90a float16 64 csrc/sm90/instantiations/half_64.cu)
bsfa_add_kernel(bsfa forward 90a float16 128 csrc/sm90/instantiations/half_128.cu)
bsfa_add_kernel(bsfa forward 90a float16 256 csrc/sm90/instantiations/half_256.cu)
bsfa_add_kernel(bsfa forward 90a bfloat16 64 csrc/sm90/instantiations/bfloat16_64.cu)
bsfa_add_kernel(bsfa forward 90a bfloat16 128 csrc/sm90/instantiations/bfloat16_128.cu)
bsfa_add_kernel(bsfa forward 90a bfloat16 256 csrc/sm90/instantiations/bfloat16_256.cu)

bsfa_add_kernel(bsfa block_maxima 80 float16 64 csrc/sm80/instantiations/half_64_maxima.cu)
bsfa_add_kernel(bsfa block_maxima 80 float16 128 csrc/sm80/instantiations/half_128_maxima.cu)
bsfa_add_kernel(bsfa block_maxima 80 float16 256 csrc/sm80/instantiations/half_256_maxima.cu)
bsfa_add_kernel(bsfa block_maxima 80 bfloat16 64 csrc/sm80/instantiations/bfloat16_64_maxima.cu)
bsfa_add_kernel(bsfa block_maxima 80 bfloat16 128 csrc/sm80/instantiations/bfloat16_128_maxima.cu)
bsfa_add_kernel(bsfa block_maxima 80 bfloat16 256 csrc/sm80/instantiations/bfloat16_256_maxima.cu)

bsfa_add_kernel(bsfa select_blocks 80 float16 64 csrc/sm80/instantiations/half_64_select.cu)
bsfa_add_kernel(bsfa select_blocks 80 float16 128 csrc/sm80/instantiations/half_128_select.cu)
bsfa_add_kernel(bsfa select_blocks 80 float16 256 csrc/sm80/instantiations/half_256_select.cu)
bsfa_add_kernel(bsfa select_blocks 80 bfloat16 64 csrc/sm80/instantiations/bfloat16_64_select.cu)
bsfa_add_kernel(bsfa select_blocks 80 bfloat16 128 csrc/sm80/instantiations/bfloat16_128_select.cu)
bsfa_add_kernel(bsfa select_blocks 80 bfloat16 256 csrc/sm80/instantiations/bfloat16_256_select.cu)

bsfa_add_kernel(bsfa select_blocks 90a float16 64 csrc/sm90/instantiations/half_64_select.cu)
bsfa_add_kernel(bsfa select_blocks 90a float16 128 csrc/sm90/instantiations/half_128_select.cu)
bsfa_add_kernel(bsfa select_blocks 90a float16 256 csrc/sm90/instantiations/half_256_select.cu)
bsfa_add_kernel(bsfa select_blocks 90a bfloat16 64 csrc/sm90/instantiations/bfloat16_64_select.cu)
bsfa_add_kernel(bsfa select_blocks 90a bfloat16 128 csrc/sm90/instantiations/bfloat16_128_select.cu)
bsfa_add_kernel(bsfa select_blocks 90a bfloat16 256 csrc/sm90/instantiations/bfloat16_256_select.cu)

bsfa_add_kernel(bsfa attend_blocks 80 float16 64 csrc/sm80/instantiations/half_64_attend.cu)
bsfa_add_kernel(bsfa attend_blocks 80 float16 128 csrc/sm80/instantiations/half_128_attend.cu)
bsfa_add_kernel(bsfa attend_blocks 80 float16 256 csrc/sm80/instantiations/half_256_attend.cu)
bsfa_add_kernel(bsfa attend_blocks 80 bfloat16 64 csrc/sm80/instantiations/bfloat16_64_attend.cu)
bsfa_add_kernel(bsfa attend_blocks 80 bfloat16 128 csrc/sm80/instantiations/bfloat16_128_attend.cu)
bsfa_add_kernel(bsfa attend_blocks 80 bfloat16 256 csrc/sm80/instantiations/bfloat16_256_attend.cu)

bsfa_add_kernel(bsfa attend_blocks 90a float16 64 csrc/sm90/instantiations/half_64_attend.cu)
bsfa_add_kernel(bsfa attend_blocks 90a float16 128 csrc/sm90/instantiations/half_128_attend.cu)
bsfa_add_kernel(bsfa attend_blocks 90a float16 256 csrc/sm90/instantiations/half_256_attend.cu)
bsfa_add_kernel(bsfa attend_blocks 90a bfloat16 64 csrc/sm90/instantiations/bfloat16_64_attend.cu)
bsfa_add_kernel(bsfa attend_blocks 90a bfloat16 128 csrc/sm90/instantiations/bfloat16_128_attend.cu)
bsfa_add_kernel(bsfa attend_blocks 90a bfloat16 256 csrc/sm90/instantiations/bfloat16_256_attend.cu)
