# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""How far a model's predictions move: KL divergence from dense, perplexity, answers to needles."""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Logits computed at a time.
_LOGITS_AT_A_TIME = 1 << 26
_FIRST_BAND = 512
# Changed when the same model comes to be measured otherwise; since 3 of all of a model.
_MEASURED = b"3"
# Parts of a configuration that do not change what a model computes.
_PASSING = ("transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")


@dataclass(frozen=True)
class Band:
    """What was measured at the positions from ``start`` to ``stop - 1`` of a window.

    Attributes:
        start: first position.
        stop: past the last position.
        positions: next-token distributions compared.
        kl: mean KL divergence of the distribution from dense's, in nats; 0 for dense.
        nll: mean negative log-likelihood of the next token, in nats.
        agreement: share of positions whose most likely token is dense's.
    """

    start: int
    stop: int
    positions: int
    kl: float
    nll: float
    agreement: float


@dataclass(frozen=True)
class Predictions:
    """Final hidden states of a window, from which logits are made when they are needed.

    Attributes:
        hidden: [seqlen, width].
        seconds: what the forward pass took.
    """

    hidden: Tensor
    seconds: float


class LanguageModel:
    """A causal model whose logits are made a few positions at a time.

    A 32K-token window of a model with 128K tokens has 17 GB of float32 logits; hidden states have
    a hundredth of that.
    """

    def __init__(self, model: Any) -> None:
        """Find out whether the model's logits are its output embedding of its last hidden state."""
        self.model = model
        self.device = next(model.parameters()).device
        self._head = model.get_output_embeddings()
        self._split = self._head is not None and self._is_plain()

    @torch.inference_mode()
    def predict(self, ids: Sequence[int]) -> Predictions:
        """Read a window.

        Raises:
            ValueError: a token is not in the model's vocabulary.
        """
        check_tokens(self.model, ids)
        tokens = torch.tensor([list(ids)], device=self.device)
        self._synchronize()
        begin = time.perf_counter()
        hidden = self.read(tokens)
        self._synchronize()
        return Predictions(hidden[0], time.perf_counter() - begin)

    def read(self, tokens: Tensor) -> Tensor:
        """What ``logits`` makes logits of, [1, seqlen, width], for tokens [1, seqlen]."""
        if self._split:
            return self.model.base_model(  # type: ignore[no-any-return]
                input_ids=tokens, use_cache=False
            ).last_hidden_state
        return self.model(input_ids=tokens, use_cache=False).logits  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [..., vocabulary] of hidden states [..., width]."""
        return (self._head(hidden) if self._split else hidden).float()

    @torch.inference_mode()
    def compare(self, found: Predictions, dense: Predictions, ids: Sequence[int]) -> list[Band]:
        """Compare predictions with dense ones, by bands of positions (``band_edges``)."""
        tokens = torch.tensor(list(ids), device=self.device)
        count = len(tokens) - 1
        vocabulary = self._head.weight.shape[0] if self._split else dense.hidden.shape[-1]
        step = max(_LOGITS_AT_A_TIME // vocabulary, 1)
        kl, nll, agreement = (torch.empty(count, device=self.device) for _ in range(3))
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            expected = self.logits(dense.hidden[part]).log_softmax(-1)
            if found is dense:
                actual = expected
                kl[part] = 0
            else:
                actual = self.logits(found.hidden[part]).log_softmax(-1)
                kl[part] = (expected.exp() * (expected - actual)).sum(-1)
            following = tokens[part.start + 1 : part.stop + 1, None]
            nll[part] = -actual.gather(-1, following)[:, 0]
            agreement[part] = (actual.argmax(-1) == expected.argmax(-1)).float()
        bands = []
        for start, stop in band_edges(count):
            means = [float(x[start:stop].mean()) for x in (kl, nll, agreement)]
            bands.append(Band(start, stop, stop - start, *means))
        return bands

    @torch.inference_mode()
    def answer(self, prompt: Sequence[int], answer: Sequence[int]) -> tuple[bool, float, float]:
        """Whether greedy decoding gives an answer, and how likely it is.

        The prompt is read under the attention in force, the answer's tokens as decoding would.

        Returns:
            Hit, log-probability of the whole answer, and seconds for the prompt.
        """
        tokens = torch.tensor([list(prompt)], device=self.device)
        from transformers import DynamicCache

        self._synchronize()
        begin = time.perf_counter()
        cache = {cache_argument(self.model): DynamicCache(config=self.model.config)}
        first = self.model(input_ids=tokens, use_cache=True, logits_to_keep=1, **cache)
        self._synchronize()
        seconds = time.perf_counter() - begin
        logits = first.logits[0, -1:]
        wanted = torch.tensor(list(answer), device=self.device)
        if len(wanted) > 1:
            rest = self.model(input_ids=wanted[None, :-1], use_cache=True, **cache)
            logits = torch.cat((logits, rest.logits[0]))
        likely = logits.float().log_softmax(-1)
        hit = bool((likely.argmax(-1) == wanted).all())
        return hit, float(likely.gather(-1, wanted[:, None]).sum()), seconds

    @torch.inference_mode()
    def _is_plain(self) -> bool:
        tokens = torch.arange(8, device=self.device)[None]
        hidden = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        logits = self.model(input_ids=tokens, use_cache=False).logits
        own = self._head(hidden)
        return own.shape == logits.shape and torch.allclose(own, logits, rtol=1e-3, atol=1e-3)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def band_edges(count: int) -> list[tuple[int, int]]:
    """Bands of positions that double in length: 0-511, 512-1023, 1K-2K, and so on."""
    edges = [0]
    edge = _FIRST_BAND
    while edge < count:
        edges.append(edge)
        edge *= 2
    return list(zip(edges, [*edges[1:], count], strict=True))


def cache_argument(model: Any) -> str:
    """What a model calls its cache: transformers 5.24 renamed ``past_key_values``."""
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def check_tokens(model: Any, ids: Sequence[int]) -> None:
    """Refuse tokens that a model has no embedding for, as another model's tokenizer makes them.

    Raises:
        ValueError: there is one.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    wrong = [token for token in ids if not 0 <= token < rows]
    if wrong:
        raise ValueError(
            f"tokens must be below {rows}, the model's vocabulary, got {wrong[0]}: is the "
            "tokenizer this model's?"
        )


def fingerprint(model: Any) -> str:
    """Digest by which a model's measurements are told from those of another.

    It depends on the configuration, on every parameter and on every buffer. Names of the model, the
    implementation of attention and the version of transformers have no part in it.
    """
    digest = hashlib.sha256(_MEASURED)
    if hasattr(model, "config"):
        config = _lasting(model.config.to_dict())
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    sums: dict[torch.device, list[Tensor]] = {}
    for name, tensor in (*sorted(model.named_parameters()), *sorted(model.named_buffers())):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if tensor.numel() and not tensor.is_meta:
            parts = [_sums(part) for part in _plain(tensor.detach())]
            sums.setdefault(tensor.device, []).append(torch.stack(parts).sum(0))
    for group in sums.values():
        digest.update(torch.stack(group).cpu().numpy().tobytes())
    return digest.hexdigest()


def _lasting(value: Any) -> Any:
    """A configuration without what may change between two runs of one model."""
    if isinstance(value, Mapping):
        return {
            str(key): _lasting(part)
            for key, part in value.items()
            if not str(key).startswith(("_", "bsfa_")) and key not in _PASSING
        }
    return [_lasting(part) for part in value] if isinstance(value, list | tuple) else value


def _plain(tensor: Tensor) -> list[Tensor]:
    """A tensor, or those that a quantised one is made of; all ranks' of one that they share."""
    if hasattr(tensor, "full_tensor"):
        return _plain(tensor.full_tensor())
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in _plain(getattr(tensor, name))]
    return [tensor]


def _sums(tensor: Tensor) -> Tensor:
    """Two sums of a tensor's bits, int64 [2]: of all of them, and of its rows by their number.

    Integers that wrap around, so that the order of adding does not matter.
    """
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    rows = tensor.reshape(tensor.shape[0] if tensor.ndim else 1, -1)
    by_row = rows.contiguous().view(whole).sum(-1, dtype=torch.int64)
    numbers = torch.arange(1, len(by_row) + 1, device=by_row.device)
    return torch.stack((by_row.sum(), (by_row * numbers).sum()))
