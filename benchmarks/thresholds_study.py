# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Which thresholds lose least at equal sparsity, on a real model and on held-out text.

Every candidate is calibrated on some contexts and run on others at several sparsities: the paper's
table (absolute thresholds for k blocks), one like it for a budget of softmax mass instead of k, one
scalar for the whole model under each rule, one scalar a head or a layer, allotted by the measured
effect of the head's error on the predictions or by the mass that it loses
(``study.allotment``), and thresholds learned by gradient
(``bsfa_calib.learning``), in both geometries. What is compared is the KL divergence of the
next-token distributions from dense, and how much can be skipped at a given divergence; intervals
are from a bootstrap over contexts, the same contexts for all.

    python benchmarks/thresholds_study.py --model MODEL --text DIR --length 4096 --contexts 16

Native kernels are used on a GPU where the installation has them, and elsewhere an emulation in
PyTorch. Results are written as they come; what --out holds of the same contexts is not run again,
and thresholds that were learned are kept in the folder --learned.
"""

from __future__ import annotations

from harness import run_program
from study.run import main

if __name__ == "__main__":
    run_program(main)
