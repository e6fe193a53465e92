# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""What the attention function must know of a mask, found once a forward pass and not once a layer.

transformers lets an attention implementation bring its own mask function. Ours returns

* ``None`` where the mask is the causal one over all keys and nothing is padded,
* a `DeferredMask` elsewhere: to the model it is the mask that its original implementation would
  have got, but it is made only when somebody looks into it. It carries a `Plan`, by which the
  attention function computes block-sparse without that mask, and it makes the original mask for
  the layers that run dense.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    sdpa_mask,
)

from bsfa_calib.dense import causal_mask
from bsfa_calib.reasons import Reason
from bsfa_hf.originals import EAGER, SDPA, none_is_causal, original_of, own_mask

_PLAN = "_bsfa_plan"
_UNMADE = object()


@dataclass(frozen=True)
class Span:
    """The part of a batch row that belongs to its prompt.

    Attributes:
        queries: the rows of the call's queries: a slice, or indices where padding lies between.
        keys: the keys they may see, causal and aligned to their end; likewise.
        seqlen_q: number of queries.
        seqlen_k: number of keys.
    """

    queries: slice | Tensor
    keys: slice | Tensor
    seqlen_q: int
    seqlen_k: int


@dataclass(frozen=True)
class Plan:
    """How a call is to be computed.

    Attributes:
        reason: why the layers run dense on the mask that carries the plan; None if they need not.
        offset: position of the call's first query among the keys.
        spans: for each batch row what is not padding; None where nothing is padded and every key
            up to the last query's position is seen.
        prefill: whether the call is known to be part of a prefill, however few its queries.
        drafts: queries at the end that are drafted tokens to be verified. Each of them stands for
            a decode step; offset and spans are those of the queries before them.
    """

    reason: Reason | None = None
    offset: int = 0
    spans: tuple[Span, ...] | None = None
    prefill: bool = False
    drafts: int = 0


class _Content:
    """What `DeferredMask` stands for; all of its copies on other devices share it."""

    def __init__(self, plan: Plan, call: dict[str, Any], original: str, own: Any = _UNMADE) -> None:
        self.plan = plan
        self._call = call
        self._original = original
        self._own = own
        self._explicit: Tensor | None = None
        self._written = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self._call["batch_size"], 1, self._call["q_length"], self._call["kv_length"])

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._call.get("dtype", torch.float32)
        return dtype if self._original == EAGER else torch.bool

    def write(self) -> Tensor:
        """The mask as a tensor that the model is about to write into."""
        if not self._written:
            self._own = self._explicit = self.explicit().clone()
            self.plan = Plan(Reason.OWN_MASK)
            self._written = True
        return self.explicit()

    def own(self, first: int = 0) -> Any:
        """The original implementation's mask, for the queries from the first on."""
        if self._written:
            return self.explicit()[:, :, first:]
        if first:
            call = {**self._call, "q_length": self._call["q_length"] - first}
            call["q_offset"] += first
            return own_mask(self._original)(**call)
        if self._own is _UNMADE:
            self._own = own_mask(self._original)(**self._call)
        return self._own

    def explicit(self) -> Tensor:
        """The mask as a 4-D tensor: of numbers for eager attention, else boolean."""
        if self._explicit is None:
            made = self._own if self._original in (EAGER, SDPA) else None
            if not isinstance(made, Tensor):
                function: Callable[..., Any] = eager_mask if self._original == EAGER else sdpa_mask
                skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
                made = function(**{**self._call, **skips})
                if self._original in (EAGER, SDPA):
                    self._own = made
            assert isinstance(made, Tensor)
            self._explicit = made
        return self._explicit


class DeferredMask(torch.Tensor):
    """A mask [batch, 1, seqlen_q, seqlen_k] that is made when somebody looks into it.

    Every operation but a move to another device, or a slice that takes all, makes the mask and
    gives an ordinary tensor. It is marked as the model's own, for which calls run dense.
    """

    content: _Content
    made: Tensor

    @staticmethod
    def __new__(cls, content: _Content, device: torch.device | str) -> DeferredMask:
        """Stand for a content on a device."""
        mask: DeferredMask = torch.Tensor._make_wrapper_subclass(
            cls, content.shape, dtype=content.dtype, device=torch.device(device)
        )
        mask.content = content
        return mask

    def __init__(self, content: _Content, device: torch.device | str) -> None:
        """See ``__new__``."""

    @property
    def plan(self) -> Plan:
        """How to compute what the mask asks for."""
        return self.content.plan

    def own(self, first: int = 0) -> Any:
        """The original implementation's mask on this device: of the queries from ``first`` on."""
        made = self.content.own(first)
        # A BlockMask of flex_attention has no device of its own.
        held = getattr(made, "kv_num_blocks", made)
        return made if held is None or held.device == self.device else made.to(self.device)

    def explicit(self) -> Tensor:
        """The mask as an ordinary tensor [batch, 1, seqlen_q, seqlen_k] on this device."""
        made = self.content.explicit()
        return made if made.device == self.device else made.to(self.device)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeferredMask(shape={list(self.shape)}, plan={self.content.plan})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """For compiled parts of a model, within which nothing is deferred."""
        if not hasattr(self, "made"):
            self.made = self.explicit()
        return ["made"], None

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], _: None, size: Any, stride: Any
    ) -> DeferredMask:
        """A mask that is there, within compiled code."""
        made = inner["made"]
        names = ("batch_size", "", "q_length", "kv_length")
        call = {**dict(zip(names, made.shape, strict=True)), "dtype": made.dtype}
        original = SDPA if made.dtype == torch.bool else EAGER
        content = _Content(Plan(Reason.TRACED_MASK), call, original, made)
        mask = DeferredMask(content, made.device)
        mask.made = made
        return mask

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Let a model write into the mask; nothing else is done here."""
        if function is torch.Tensor.__setitem__ and isinstance(args[0], DeferredMask):
            args = (args[0].content.write(), *args[1:])
        return torch._C._disabled_torch_function_impl(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Make the mask and give the operation the ordinary tensor."""
        kwargs = kwargs or {}
        mask = args[0] if args else None
        if isinstance(mask, DeferredMask) and _takes_all(function, args[1:], kwargs, mask):
            return DeferredMask(mask.content, kwargs.get("device") or mask.device)

        if function._schema.is_mutable and isinstance(mask, DeferredMask):
            args = (mask.content.write(), *args[1:])

        def ordinary(x: Any) -> Any:
            return x.explicit() if isinstance(x, DeferredMask) else x

        made = function(*tree_map(ordinary, args), **tree_map(ordinary, kwargs))
        if isinstance(made, Tensor) and made.ndim == 4:
            setattr(made, _PLAN, (Plan(Reason.OWN_MASK), None))
        return made


def _takes_all(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mask: DeferredMask
) -> bool:
    """Whether an operation gives the mask itself, on the same device or on another."""
    aten = torch.ops.aten
    if function in (aten.detach.default, aten.alias.default):
        return True
    if function is aten._to_copy.default:
        return kwargs.get("dtype") in (None, mask.dtype)
    if function is aten.slice.Tensor:
        usual: tuple[Any, ...] = (0, None, None, 1)
        dim, start, stop, step = (*args, *usual[len(args) :])
        length = mask.shape[dim]
        return start in (None, 0) and (stop is None or stop >= length) and step == 1
    return False


def bsfa_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    config: Any = None,
    **options: Any,
) -> Any:
    """The mask function that is registered with transformers beside the attention function.

    Args:
        batch_size: rows of the batch.
        q_length: queries of the call.
        kv_length: keys that the attention function will get (all of a static cache's).
        q_offset: position of the first query.
        kv_offset: position of the first key.
        mask_function: transformers' rule of what sees what.
        attention_mask: 2-D padding mask, [batch, tokens seen], true where there is a token.
        local_size: size of the sliding window or attention chunk, of layers that have one.
        allow_is_causal_skip: whether the model is content with None for the causal mask.
        device: where the mask is needed.
        config: the model's configuration.
        options: further arguments of transformers' own mask functions.

    Returns:
        None, a `DeferredMask`, or what the model's original implementation would get.
    """
    original = original_of(config)
    call = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "local_size": local_size,
        "allow_is_causal_skip": allow_is_causal_skip,
        "device": device,
        "config": config,
        **options,
    }
    plain = mask_function is causal_mask_function
    if local_size is not None and not window_bites(config, local_size, q_offset, q_length):
        local_size = None
        plain = allow_is_causal_skip and not options.get("use_vmap", False)
    reason = _reason_for_dense(kv_offset, mask_function, plain, local_size, config)
    if reason is None and q_length > 1 and not allow_is_causal_skip:
        reason = Reason.OWN_MASK
    if torch.compiler.is_compiling():
        static = isinstance(q_offset, Tensor) or q_offset + q_length != kv_length
        if reason is None and attention_mask is None and not static and none_is_causal(original):
            return None
        if static or reason is Reason.OWN_MASK:
            # No argument tells the attention function of a cache's empty part, or of the layer's
            # chunks: the mask must.
            call["allow_is_causal_skip"] = False
        return own_mask(original)(**call)

    stage = _stage_of_generate()
    if stage.verifies or (q_length == 1 and not stage.prefill):
        reason = reason or Reason.DECODE
    at_once = reason in (Reason.DECODE, Reason.NOT_CAUSAL) or (q_length == 1 and not stage.prefill)
    if at_once:
        # The mask is small or of no use to a plan, and is what compiled decode steps are given.
        made = own_mask(original)(**call)
        if made is None or (isinstance(made, Tensor) and made.ndim == 4):
            if made is not None:
                _attach(made, Plan(reason))
            return made
    # The cache counts on in the same tensor as soon as the first layer has run.
    static = isinstance(q_offset, Tensor)
    call["q_offset"] = int(q_offset)
    plan = Plan(reason) if reason is not None else _plan_of_padding(call, stage)
    content = _Content(plan, call, original)
    if static and stage.chunked and original in (EAGER, SDPA):
        # transformers may have compiled the model for this, and hands it the mask.
        mask = content.explicit()
        _attach(mask, plan)
        return mask
    simple = plan == Plan(prefill=stage.prefill) and q_length == kv_length > 1
    if simple and none_is_causal(original):
        return None
    return DeferredMask(content, device)


def _plan_of_padding(call: dict[str, Any], stage: _Stage) -> Plan:
    """The plan of a causal mask with or without padding."""
    batch, q_length, kv_length = (call[name] for name in ("batch_size", "q_length", "kv_length"))
    offset, mask = call["q_offset"], call["attention_mask"]
    drafts = min(stage.drafts, q_length - 1)
    q_length -= drafts
    seen = offset + q_length
    spans: tuple[Span, ...] | None = None
    if mask is not None:
        padding = torch.nn.functional.pad(
            mask[:, : min(kv_length, seen)].to(device=call["device"], dtype=torch.bool),
            (0, max(seen - mask.shape[-1], 0)),
        )
        # Looking at the values waits for the device, once a forward pass.
        lengths = padding.sum(-1).tolist()
        if any(length != seen for length in lengths):
            spans = spans_of(padding, offset, q_length)
    if spans is None and seen + drafts != kv_length:
        # A static cache has keys beyond the last query.
        spans = (Span(slice(0, q_length), slice(0, seen), q_length, seen),) * batch
    return Plan(offset=offset, spans=spans, prefill=stage.prefill, drafts=drafts)


def _reason_for_dense(
    kv_offset: int,
    mask_function: Callable[..., Any],
    plain: bool,
    local_size: int | None,
    config: Any,
) -> Reason | None:
    if mask_function is bidirectional_mask_function:
        return Reason.NOT_CAUSAL
    if local_size is not None:
        chunk = getattr(config, "attention_chunk_size", None)
        return Reason.OWN_MASK if chunk == local_size else Reason.SLIDING_WINDOW
    return None if plain and kv_offset == 0 else Reason.OWN_MASK


def window_bites(config: Any, window: int, offset: int | Tensor, seqlen_q: int) -> bool:
    """Whether a layer with a sliding window runs dense.

    It does if the model takes prompts in which the window hides a key, lest chunks and padded rows
    depend on the length of a prompt; and if it hides one in this call.

    Args:
        config: the model's configuration.
        window: keys that a query sees, itself among them.
        offset: position of the first query among the keys.
        seqlen_q: queries of the call.
    """
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None or window < longest:
        return True
    if isinstance(offset, Tensor) and torch.compiler.is_compiling():
        return True  # what a tensor holds cannot be asked for
    return bool(offset + seqlen_q > window)


class _Stage(NamedTuple):
    """Where ``generate`` stands.

    Attributes:
        prefill: whether it reads the prompt.
        chunked: whether it does so in chunks.
        drafts: drafted tokens that it reads together with the prompt.
        verifies: whether it reads drafted tokens and no prompt.
    """

    prefill: bool = False
    chunked: bool = False
    drafts: int = 0
    verifies: bool = False


def _stage_of_generate() -> _Stage:
    """What the nearest ``generate`` among the callers does.

    Arguments do not tell. The last chunk of a chunked prefill may hold one token: it looks like a
    decode step, but has to read the thresholds of its row, as in a whole prefill. Drafted tokens
    look like a prefill, but each stands for a decode step. A model that drafts them starts a
    ``generate`` of its own each time, which is a prefill the first time alone.
    """
    prefill: _Stage | None = None
    frame = sys._getframe(1)
    for _ in range(96):
        if frame.f_back is None:
            break
        frame = frame.f_back
        name = frame.f_code.co_name
        if name not in ("_assisted_decoding", "_prefill", "generate"):
            continue
        if not str(frame.f_globals.get("__name__")).startswith("transformers."):
            continue  # a function of the user's may have the same name
        if name == "_assisted_decoding":
            if not frame.f_locals.get("is_first_iteration", False):
                return _Stage(verifies=True)
            return prefill or _Stage(True, drafts=frame.f_locals.get("candidate_length", 0))
        if name == "_prefill" and prefill is None:
            options = frame.f_locals.get("generation_config")
            chunked = getattr(options, "prefill_chunk_size", None) is not None
            prefill = _Stage(prefill=True, chunked=chunked)
        if name == "generate" and prefill is None:
            break
    return prefill or _Stage()


def spans_of(padding: Tensor, offset: int, seqlen_q: int) -> tuple[Span, ...]:
    """The spans of a padded batch.

    Args:
        padding: bool [batch, seqlen_k], true where there is a token of the prompt.
        offset: position of the first query.
        seqlen_q: queries of the call.
    """
    spans = []
    for row in padding.cpu():
        keys = row.nonzero().squeeze(1)
        queries = keys[(keys >= offset) & (keys < offset + seqlen_q)] - offset
        spans.append(
            Span(
                _as_slice(queries, padding.device),
                _as_slice(keys, padding.device),
                len(queries),
                len(keys),
            )
        )
    return tuple(spans)


def _as_slice(indices: Tensor, device: torch.device) -> slice | Tensor:
    if len(indices) == 0:
        return slice(0, 0)
    start, stop = int(indices[0]), int(indices[-1]) + 1
    return slice(start, stop) if stop - start == len(indices) else indices.to(device)


def plan_of(mask: Tensor, seqlen_q: int, seqlen_k: int) -> Plan:
    """The plan of a mask: that which `bsfa_mask` gave it, or one found from its values.

    Args:
        mask: a `DeferredMask`, bool or int [batch, seqlen_k], or [batch, heads or 1, seqlen_q,
            seqlen_k], bool or additive.
        seqlen_q: queries of the call.
        seqlen_k: keys of the call.

    Raises:
        ValueError: the mask is not a causal one, with or without padding.
    """
    plan = known_plan(mask)
    if plan is not None:
        return plan
    if mask.ndim == 2:
        offset = seqlen_k - seqlen_q
        plan = Plan(offset=offset, spans=spans_of(mask.bool(), offset, seqlen_q))
    elif mask.ndim == 4:
        plan = _plan_of_custom(mask, seqlen_q, seqlen_k)
    else:
        raise ValueError(
            "an attention mask must be [batch, keys] or [batch, heads, queries, keys], got "
            f"{list(mask.shape)}"
        )
    if not mask.is_inference():  # else a change in place would go unseen
        _attach(mask, plan)
    return plan


def _plan_of_custom(mask: Tensor, seqlen_q: int, seqlen_k: int) -> Plan:
    refusal = (
        'attn_implementation="bsfa" computes causal attention with or without padding, and this '
        f"attention mask of shape {list(mask.shape)} asks for something else ({{}}); use "
        '"sdpa" or "eager" for it'
    )
    if tuple(mask.shape[2:]) != (seqlen_q, seqlen_k):
        raise ValueError(refusal.format(f"there are {seqlen_q} queries and {seqlen_k} keys"))
    if mask.dtype == torch.bool:
        allowed = mask
    else:
        allowed = mask == 0
        hidden = mask <= torch.finfo(torch.float16).min / 2
        if not bool((allowed | hidden).all()):
            raise ValueError(refusal.format("it adds a bias to some scores"))
    if not bool((allowed == allowed[:, :1]).all()):
        raise ValueError(refusal.format("it differs between heads"))
    allowed = allowed[:, 0]
    last = allowed[:, -1]
    offsets = [seqlen_k - seqlen_q]
    if len(last) and bool(last.any()):
        # A static cache has keys beyond the last query.
        offsets.append(int(last.any(0).nonzero()[-1]) + 1 - seqlen_q)
    for offset in offsets:
        if offset < 0:
            continue
        valid = last[:, offset : offset + seqlen_q]
        expected = causal_mask(seqlen_q, seqlen_k, offset, mask.device)[0] & last[:, None, :]
        same = (allowed == expected).all(-1)
        if not bool((same | ~valid).all()):
            continue
        # What the last query does not see is padding, or the packed sequences before its own.
        seen = allowed.sum(-1)
        if bool((same | valid | (seen == 0) | (seen == seqlen_k)).all()):
            return Plan(offset=offset, spans=spans_of(last, offset, seqlen_q))
        own = allowed[:, :, offset : offset + seqlen_q].diagonal(dim1=1, dim2=2)
        if bool((same | valid | (own & (seen == 1))).all()):
            return Plan(Reason.OWN_MASK)  # padding that sees itself, or sequences of one token
    raise ValueError(
        refusal.format(
            "a query sees keys after it, or not all keys before it; of packed sequences, tell "
            "cu_seq_lens_q and cu_seq_lens_k"
        )
    )


def _version(mask: Tensor) -> int:
    """Counts the changes of a mask in place, except in inference mode."""
    return 0 if mask.is_inference() else mask._version


def _attach(mask: Tensor, plan: Plan) -> None:
    setattr(mask, _PLAN, (plan, _version(mask)))


def known_plan(mask: Tensor) -> Plan | None:
    """The plan that a mask was given, unless it has been changed since."""
    if isinstance(mask, DeferredMask):
        return mask.plan
    plan, version = getattr(mask, _PLAN, (None, None))
    return plan if version in (None, _version(mask)) else None


def equal_spans(spans: Sequence[Span]) -> bool:
    """Whether all rows of a batch have the same slices, so that one call serves them."""
    first = spans[0]
    return isinstance(first.queries, slice) and all(
        isinstance(span.queries, slice)
        and isinstance(span.keys, slice)
        and (span.queries, span.keys) == (first.queries, first.keys)
        for span in spans
    )
