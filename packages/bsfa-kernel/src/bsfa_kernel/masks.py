# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Block masks: a bit for every query block and key block, 64 in a word."""

from __future__ import annotations

import torch
from torch import Tensor

from bsfa_kernel._calls import MASK_BITS
from bsfa_kernel._checks import check_tensor
from bsfa_kernel.geometry import block_count


def pack_blocks(blocks: Tensor) -> Tensor:
    """The words of a block mask.

    Args:
        blocks: bool [..., k_blocks].

    Returns:
        int64 [..., ceil(k_blocks / 64)]: bit j of word i stands for block 64 * i + j.

    Raises:
        TypeError: ``blocks`` is not a bool tensor.
        ValueError: it has no dimension.
    """
    check_tensor(blocks, "blocks")
    if blocks.dtype != torch.bool:
        raise TypeError(f"blocks must be bool, got {str(blocks.dtype).removeprefix('torch.')}")
    if blocks.dim() < 1:
        raise ValueError("blocks must be [..., k_blocks], got a tensor without dimensions")
    words = block_count(blocks.shape[-1], MASK_BITS)
    padded = torch.nn.functional.pad(blocks, (0, words * MASK_BITS - blocks.shape[-1]))
    bits = padded.view(*blocks.shape[:-1], words * 8, 8).to(torch.uint8)
    # Each bit is in one term alone, so that the sum is their union. Bytes are little-endian.
    places = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    octets: Tensor = (bits << places).sum(-1, dtype=torch.uint8)
    return octets.flatten().view(torch.int64).view(*blocks.shape[:-1], words)


def unpack_blocks(block_mask: Tensor, k_blocks: int) -> Tensor:
    """The bits of a block mask, what ``pack_blocks`` was given.

    Args:
        block_mask: int64 [..., words].
        k_blocks: how many bits to return, from the first. In graphs that are exported with dynamic
            lengths, query blocks, words and these must be 2 at least.

    Returns:
        bool [..., k_blocks].

    Raises:
        TypeError: ``block_mask`` is not an int64 tensor, or ``k_blocks`` no whole number.
        ValueError: it has no dimension, or fewer bits than ``k_blocks``.
    """
    check_tensor(block_mask, "block_mask")
    if block_mask.dtype != torch.int64:
        raise TypeError(
            f"block_mask must be int64, got {str(block_mask.dtype).removeprefix('torch.')}"
        )
    if block_mask.dim() < 1:
        raise ValueError("block_mask must be [..., words], got a tensor without dimensions")
    if isinstance(k_blocks, bool) or not isinstance(k_blocks, (int, torch.SymInt)):
        raise TypeError(f"k_blocks must be a whole number, got {type(k_blocks).__name__}")
    words = block_mask.shape[-1]
    if not 0 <= k_blocks <= words * MASK_BITS:
        raise ValueError(
            f"k_blocks must be between 0 and {words * MASK_BITS} ({words} words of {MASK_BITS} "
            f"bits), got {k_blocks}"
        )
    octets = block_mask.contiguous().view(-1).view(torch.uint8)
    octets = octets.view(*block_mask.shape[:-1], words * 8)
    octets = octets[..., : block_count(k_blocks, 8)]
    places = torch.arange(8, dtype=torch.uint8, device=block_mask.device)
    bits = (octets[..., None] >> places) & 1
    return bits.bool().flatten(-2)[..., :k_blocks]
