# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""Random calls in great number against the reference: python fuzz.py --count 10000.

Every call runs on each architecture whose kernels the GPU runs, and all are compared with the
reference in float64 on the same device. Exits with 1 if one differs, and says which, and how to run
it again.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import time
from dataclasses import dataclass

import torch

import bsfa_kernel
import cases
import paging
from bsfa_kernel import GEOMETRIES, RULES, VOTERS, Geometry, _native, reference
from bsfa_kernel.geometry import query_block_count
from compare import by_query

INF = float("inf")
MARGIN = 1e-3
NAMES = (
    *("kept", "out", "rms of out", "lse"),
    *("kept by mask", "out by mask", "rms of out by mask", "lse by mask"),
    "selection in 8 bits",
)
WHOLE = set(cases.KERNEL_HEAD_DIMS)  # head dimensions that fill a kernel's tiles: the likeliest
LEVELS = {"absolute": 2.0, "running_max": 0.0, "peak_lse": -1.5}


@dataclass(frozen=True)
class Call:
    """One random call; a function of its seed alone."""

    seed: int
    batch: int
    lengths: tuple[tuple[int, int], ...]  # of each sequence if packed, else one pair
    packed: bool
    kv_heads: int
    group: int
    head_dim: int
    dtype: torch.dtype
    causal: bool
    scale: float | None
    rule: str
    geometry: Geometry
    rows: int
    level: float
    layout: str
    special: float | None  # NaN or ±inf: an element of q and one of k
    voters: int
    page_size: int | None  # keys are in pages of so many
    sinks: str | None  # which of cases.SINKS

    @classmethod
    def random(cls, seed: int, dtypes: list[torch.dtype], head_dims: list[int]) -> Call:
        """The call of a seed."""
        rng = random.Random(seed)

        def length() -> int:
            if rng.random() < 0.5:
                return max(64 * rng.randint(0, 6) + rng.randint(-1, 1), 1)
            return rng.randint(1, 400)

        packed = rng.random() < 0.2
        count = rng.randint(1, 4) if packed else 1
        lengths = []
        for _ in range(count):
            seqlen_q = length()
            pair = (seqlen_q, seqlen_q if rng.random() < 0.4 else length())
            lengths.append((0, pair[1]) if packed and rng.random() < 0.1 else pair)
        if sum(q for q, _ in lengths) == 0:
            lengths[0] = (1, lengths[0][1])
        rule = rng.choice(RULES)
        call = cls(
            seed=seed,
            batch=1 if packed else rng.randint(1, 3),
            lengths=tuple(lengths),
            packed=packed,
            kv_heads=rng.randint(1, 3),
            group=rng.choice([1, 1, 2, 3, 4]),
            head_dim=rng.choice([rng.choice(head_dims), *WHOLE.intersection(head_dims)]),
            dtype=rng.choice(dtypes),
            causal=rng.random() < 0.7,
            scale=rng.choice([None, None, 0.05, 0.2]),
            rule=rule,
            geometry=rng.choice(GEOMETRIES),
            rows=rng.choice([1, 2, 5, 20]),
            level=LEVELS[rule] + rng.uniform(-2, 2),
            layout=rng.choice(["plain", "plain", "heads first", "padded", "interleaved"]),
            special=rng.choice([None] * 7 + [float("nan"), INF, -INF]),
            voters=rng.choice(VOTERS),
            page_size=rng.choice([None, None, 16, 32, 48, 64, 96, 256]),
            sinks=rng.choice([None, None, *cases.SINKS]),
        )
        if rng.random() > 0.03:
            return call
        # One with more tiles than multiprocessors, and more than a few key blocks in each.
        length_of_all = rng.randint(900, 1400)
        return dataclasses.replace(
            call,
            batch=1,
            lengths=((length_of_all, length_of_all),) * (2 if packed else 1),
            kv_heads=rng.randint(4, 8),
            group=4,
            scale=None,
            level=cases.MIXED_LEVELS[rule] + rng.uniform(-0.5, 0.5),
        )

    def tensor(self, length: int, heads: int, generator: torch.Generator) -> torch.Tensor:
        """Standard normal [batch, length, heads, head_dim], in the call's layout."""
        batch, dim, device = self.batch, self.head_dim, generator.device
        options = {"generator": generator, "device": device}
        if self.layout == "heads first":
            x = torch.randn((batch, heads, length, dim), **options).transpose(1, 2)
        elif self.layout == "padded":
            x = torch.randn((batch, length, heads, dim + 16), **options)
            x[..., dim:] = torch.nan
            return x.to(self.dtype)[..., :dim]
        elif self.layout == "interleaved":
            x = torch.randn((batch, length, 2, heads, dim), **options)
            x[:, :, 1] = torch.nan
            return x.to(self.dtype)[:, :, 0]
        else:
            x = torch.randn((batch, length, heads, dim), **options)
        return x.to(self.dtype)


def arguments(call: Call, device: str) -> tuple[list[torch.Tensor], dict[str, object]]:
    """q, k, v and thresholds, and the options."""
    generator = torch.Generator(device).manual_seed(call.seed)
    total_q, total_k = (sum(lengths) for lengths in zip(*call.lengths, strict=True))
    heads = call.kv_heads * call.group
    q = call.tensor(total_q, heads, generator)
    k = call.tensor(total_k, call.kv_heads, generator)
    v = call.tensor(total_k, call.kv_heads, generator)
    if call.special is not None:
        for x in (q, k):
            if x.numel():
                places = [
                    int(torch.randint(size, (), generator=generator, device=device))
                    for size in x.shape
                ]
                x[tuple(places)] = call.special
    thresholds = torch.randn((heads, call.rows), generator=generator, device=device)
    infinite = torch.rand((heads, call.rows), generator=generator, device=device)
    thresholds = thresholds * 0.5 + call.level
    thresholds[infinite < 0.1] = -INF
    thresholds[infinite > 0.95] = INF
    options: dict[str, object] = {
        "causal": call.causal,
        "scale": call.scale,
        "rule": call.rule,
        "geometry": call.geometry,
        "voters": call.voters,
        **cases.sinks_of(call.sinks, heads, device),
    }
    if call.packed:
        q, k, v = q[0], k[0], v[0]
        for name, which in (("cu_seqlens_q", 0), ("cu_seqlens_k", 1)):
            starts = [0]
            for lengths in call.lengths:
                starts.append(starts[-1] + lengths[which])
            options[name] = torch.tensor(starts, dtype=torch.int32, device=device)
    return [q, k, v, thresholds], options


def rows_of_blocks(call: Call, blocks: torch.Tensor) -> torch.Tensor:
    """[..., q_blocks] -> [..., queries]: each query has what its block has."""
    if not call.packed:
        return by_query(blocks, *call.lengths[0], call.geometry, -1)
    parts, start = [], 0
    for index, (seqlen_q, seqlen_k) in enumerate(call.lengths):
        first = start // call.geometry.q_block + 2 * index
        count = query_block_count(seqlen_q, seqlen_k, call.geometry)
        part = blocks[..., first : first + count]
        parts.append(by_query(part, seqlen_q, seqlen_k, call.geometry, -1))
        start += seqlen_q
    return torch.cat(parts, -1)


def in_pages(
    call: Call, tensors: list[torch.Tensor], options: dict[str, object]
) -> tuple[list[torch.Tensor], dict[str, object]]:
    """The same call with its keys in pages, and NaN wherever nothing may be read."""
    if call.page_size is None:
        return tensors, options
    q, k, v, thresholds = tensors
    if call.packed:
        lengths = [seqlen_k for _, seqlen_k in call.lengths]
        keys, values = (list(x.split(lengths)) for x in (k, v))
    else:
        keys, values = list(k), list(v)
    layout = paging.LAYOUTS[call.seed % len(paging.LAYOUTS)]
    cache = paging.paged(keys, values, call.page_size, layout=layout, seed=call.seed)
    paged = {name: value for name, value in options.items() if name != "cu_seqlens_k"}
    return [q, cache.k, cache.v, thresholds], {**paged, **cache.options}


def differences(
    call: Call,
    found: tuple[torch.Tensor, ...],
    expected: reference.AttentionResult,
    largest_value: torch.Tensor,
) -> torch.Tensor:
    """What differs, on the device, so that nothing waits: bool [4]: kept, out, rms of out, lse."""
    out, lse, kept = found
    kept = kept[..., : expected.kept.shape[-1]]
    clear = expected.margin > MARGIN
    rows = rows_of_blocks(call, clear)
    wrong_kept = ((kept != expected.kept) & clear).any()

    # Rounding of the weights and of the output: each eps / 2 of the largest value at most.
    eps = torch.finfo(call.dtype).eps
    shown = rows.transpose(-1, -2)[..., None]
    shown = shown & ~(out.isnan() & expected.out.isnan())
    error = (out.double() - expected.out).abs()
    wrong_out = ((~(error <= 1.1 * eps * largest_value + 1e-6)) & shown).any()
    count = shown.sum() + 1e-9
    rms = (error.square().where(shown, 0).nan_to_num(nan=INF).sum() / count).sqrt()
    signal = (expected.out.square().where(shown, 0).sum() / count).sqrt()
    wrong_rms = ~(rms <= eps * signal + 1e-6)

    nothing = expected.lse == -INF
    lse_error = (lse - expected.lse).abs() / expected.lse.abs().clamp(min=1)
    right = torch.where(nothing, lse == -INF, lse_error <= 3e-5)
    right |= lse.isnan() & expected.lse.isnan()
    wrong_lse = (~right & rows).any()
    return torch.stack((wrong_kept, wrong_out, wrong_rms, wrong_lse))


def attend(call: Call, tensors: list[torch.Tensor], options: dict[str, object]):
    """The call itself."""
    return bsfa_kernel.block_sparse_attention(
        *tensors, return_lse=True, return_kept=True, **options
    )


def kept_by_mask(call: Call, tensors: list[torch.Tensor], options: dict[str, object]):
    """What two steps with exact scores give."""
    q, k, v, thresholds = tensors
    mask = bsfa_kernel.select_blocks(q, k, thresholds, precision="exact", **options)
    shape = {name: value for name, value in options.items() if name not in ("rule", "voters")}
    return bsfa_kernel.attend_blocks(q, k, v, mask, return_lse=True, return_kept=True, **shape)


def other_verdicts(
    call: Call, tensors: list[torch.Tensor], options: dict[str, object]
) -> torch.Tensor:
    """Whether a selection in 8 bits differs where that is certain: bool, on the device.

    Between float32 and float64 a rounded value may be another by one step, and a score by as much
    as that is worth.
    """
    q, k, _, thresholds = tensors
    expected = reference.select_blocks(
        q, k, thresholds, precision="int8", compute_dtype=torch.float64, **options
    )
    blocks = bsfa_kernel.pack_blocks(expected.mask)
    (q, k, *_), options = in_pages(call, tensors, options)
    found = bsfa_kernel.select_blocks(q, k, thresholds, precision="int8", **options)
    columns, words = blocks.shape[-2:]
    wrong = (found[..., :columns, :words] != blocks).any(-1)
    scale = call.head_dim**-0.5 if call.scale is None else call.scale
    step = scale * 8 * 8 / 127  # standard normal queries and keys are below 8 and the offset small
    return (wrong & (expected.margin > 2 * step)).any()


def targets(device: str) -> list[int]:
    """The architectures whose kernels run on the device; 0 stands for the CPU's back end."""
    if device == "cpu":
        return [0]
    info = bsfa_kernel.build_info()
    major = torch.cuda.get_device_capability()[0]
    found = [arch for arch in info.architectures if arch == 80 or major == arch // 10]
    if not found:
        raise SystemExit(f"no kernels for this GPU:\n{info}")
    return found


def with_two_steps() -> set[tuple[int, torch.dtype, int]]:
    """The architectures, element types and head dimensions that have both steps; 0 is the CPU."""
    kinds: dict[str, set[tuple[int, torch.dtype, int]]] = {}
    for kernel in bsfa_kernel.build_info().kernels:
        kinds.setdefault(kernel.name, set()).update(
            (kernel.arch, getattr(torch, kernel.dtype), size) for size in kernel.head_dims
        )
    both = kinds.get("select_blocks", set()) & kinds.get("attend_blocks", set())
    return both | {
        (0, dtype, size) for dtype in (torch.float16, torch.bfloat16) for size in cases.HEAD_DIMS
    }


def main() -> int:
    """Run, print, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000, help="how many calls")
    parser.add_argument("--seed", type=int, default=0, help="of the first call")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--arch", type=int, action="append", help="80 or 90; all by default")
    parser.add_argument("--stop-after", type=int, default=10, help="failures")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --device cpu tries the script itself")
    archs = options.arch or targets(options.device)
    kernels = [kernel for kernel in bsfa_kernel.build_info().kernels if kernel.name == "forward"]
    steps = with_two_steps()
    dtypes = [torch.float16, torch.bfloat16]
    head_dims = list(cases.HEAD_DIMS)
    if options.device == "cuda":
        names = [{kernel.dtype for kernel in kernels if kernel.arch == arch} for arch in archs]
        dtypes = [getattr(torch, name) for name in sorted(set.intersection(*names))]
        sizes = [
            {size for kernel in kernels if kernel.arch == arch for size in kernel.head_dims}
            for arch in archs
        ]
        head_dims = sorted(set.intersection(*sizes))
    print(
        f"{options.count} calls from seed {options.seed} on {options.device}, architectures {archs}"
    )

    start = last = time.monotonic()
    pending: list[tuple[Call, int, torch.Tensor]] = []
    failures: list[str] = []
    clear_blocks, blocks = 0, 0
    shares: list[torch.Tensor] = []

    def settle() -> None:
        nonlocal clear_blocks, blocks
        if not pending:
            return
        for (call, arch, _), wrong in zip(
            pending, torch.stack([flags for *_, flags in pending]).tolist(), strict=True
        ):
            if any(wrong):
                what = ", ".join(name for name, bad in zip(NAMES, wrong, strict=True) if bad)
                failures.append(f"sm_{arch}: {what} differ: {call}")
        counts = torch.stack(shares).sum(0).tolist()
        clear_blocks += int(counts[0])
        blocks += int(counts[1])
        pending.clear()
        shares.clear()

    done = 0
    for seed in range(options.seed, options.seed + options.count):
        call = Call.random(seed, dtypes, head_dims)
        tensors, keywords = arguments(call, options.device)
        expected = reference.attention(*tensors, compute_dtype=torch.float64, **keywords)
        largest = tensors[2].abs().amax() if tensors[2].numel() else tensors[3].new_zeros(())
        clear = expected.margin > MARGIN
        shares.append(
            torch.stack((clear.sum(), clear.new_tensor(clear.numel(), dtype=torch.int64)))
        )
        paged, paged_keywords = in_pages(call, tensors, keywords)
        for arch in archs:
            with _native.force_arch(arch):
                found = attend(call, paged, paged_keywords)
                wrong = differences(call, found, expected, largest)
                if (arch, call.dtype, call.head_dim) in steps:
                    found = kept_by_mask(call, paged, paged_keywords)
                    by_mask = differences(call, found, expected, largest)
                    rounded = other_verdicts(call, tensors, keywords)
                    wrong = torch.cat((wrong, by_mask, rounded[None]))
                else:
                    wrong = torch.nn.functional.pad(wrong, (0, len(NAMES) - len(wrong)))
            pending.append((call, arch, wrong))
        done += 1
        if len(pending) >= 200:
            settle()
        if time.monotonic() - last > 10:
            last = time.monotonic()
            print(f"  {done} done in {last - start:.0f} s, {len(failures)} failures", flush=True)
        if len(failures) >= options.stop_after:
            break
    settle()
    seconds = time.monotonic() - start
    for failure in failures[: options.stop_after]:
        print(failure)
    if failures:
        print("run one again with: python fuzz.py --count 1 --seed SEED")
    share = clear_blocks / max(blocks, 1)
    print(
        f"{done} calls on each of {archs} in {seconds:.1f} s: {len(failures)} failures; "
        f"{share:.2%} of {blocks} query blocks had clear verdicts and were compared"
    )
    if share < 0.9:
        print("too few clear verdicts: the run proves little")
        return 1
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
