# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause
"""The parts of a back end that do not depend on which one of vLLM's is extended.

They come before vLLM's own classes in the order of bases: what has nothing to skip goes on to
those, with metadata that they made themselves.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bsfa_calib.reasons import Reason
from bsfa_kernel import block_sparse_attention
from bsfa_vllm.binding import Engine, layer_index, layer_reason
from bsfa_vllm.counting import changed, warming_up
from bsfa_vllm.planning import Part, Plan, Row, split

logger = logging.getLogger("vllm.bsfa")

PLAN = "bsfa_plan"
"""Attribute of a step's metadata: its `Plan`, where some row runs block-sparse."""
STEP = "bsfa_step"
"""Attribute of a step's metadata: its `Plan` and vLLM's description, for other groups of layers."""


class SparseBuilder:
    """Makes the metadata of a step; before vLLM's builder in the order of bases."""

    _engine: Engine | None = None
    _capturing = False

    def prepare(
        self, layers: dict[str, Any], spec: Any, dtype: torch.dtype, identity: str | None = None
    ) -> None:
        """Look at the layers that this builder works for.

        Args:
            layers: by name; each has an ``impl``.
            spec: of their cache, vLLM's ``AttentionSpec``.
            dtype: of the queries.
            identity: vLLM's name of the engine. The language model of a multimodal one is made
                under a name of its own, which each rank makes up.
        """
        chunked = getattr(spec, "attention_chunk_size", None) is not None
        self._able, self._dense_layers = 0, dict[int, Reason]()
        unnumbered = []
        for name, layer in layers.items():
            impl: Any = getattr(layer, "impl", None)
            engine: Engine | None = getattr(impl, "bsfa_engine", None)
            index = layer_index(name)
            if engine is not None and index is None:
                unnumbered.append(name)
            if engine is None or index is None or index >= engine.layers:
                continue
            self._engine = engine
            if chunked:
                # Rows are parts of requests here, and see no further back than those.
                impl.bsfa_reason = Reason.SLIDING_WINDOW
            if impl.bsfa_reason is None:
                self._able += 1
                engine.able_layers.add(index)
            else:
                self._dense_layers[index] = impl.bsfa_reason
        if self._engine is not None:
            self._engine.dense_layers.update(self._dense_layers)
            self._engine.identity = identity or self._engine.identity
        if unnumbered:
            logger.warning(
                "BSFA: these layers run dense and are not counted, for their names do not hold one "
                "number: %s",
                ", ".join(unnumbered),
            )
        device: torch.device = self.device  # type: ignore[attr-defined]
        self._probe = torch.empty((1, spec.head_size), dtype=dtype, device=device)

    def build(  # type: ignore[no-untyped-def]
        self,
        common_prefix_len: int,
        common_attn_metadata: Any,
        fast_build: bool = False,
        **more: Any,
    ):
        """The metadata that vLLM's builder makes of a step, with a plan where one is needed."""
        parent: Any = super()
        metadata = parent.build(common_prefix_len, common_attn_metadata, fast_build, **more)
        plan = self._plan(common_attn_metadata)
        if plan is not None:
            setattr(metadata, STEP, (plan, common_attn_metadata))
            self._attach(metadata, plan, common_attn_metadata)
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: Any):  # type: ignore[no-untyped-def]
        """What a graph is captured with: vLLM's own, without a plan."""
        parent: Any = super()
        self._capturing = True
        try:
            return parent.build_for_cudagraph_capture(common_attn_metadata)
        finally:
            self._capturing = False

    def update_block_table(self, metadata: Any, blk_table: Tensor, slot_mapping: Tensor):  # type: ignore[no-untyped-def]
        """The metadata of the same step for layers with other pages."""
        parent: Any = super()
        changed_metadata = parent.update_block_table(metadata, blk_table, slot_mapping)
        # It is a copy, of what was made for layers that may all run dense.
        vars(changed_metadata).pop(PLAN, None)
        step: tuple[Plan, Any] | None = getattr(metadata, STEP, None)
        if step is not None and self._engine is not None:
            plan, common = step
            parts = [dataclasses.replace(part) for part in plan.parts]
            pages = {"block_table_tensor": blk_table, "slot_mapping": slot_mapping}
            common = dataclasses.replace(common, **pages)
            self._attach(changed_metadata, dataclasses.replace(plan, parts=parts), common)
        return changed_metadata

    def _attach(self, metadata: Any, plan: Plan, common: Any) -> None:
        """Count a step for the layers of this builder, and give its plan to those that split it."""
        self._count(plan)
        if plan.sparse and self._able:
            self._describe(plan, common)
            setattr(metadata, PLAN, plan)

    def _plan(self, common: Any) -> Plan | None:
        """How to split a step; None if no layer of this builder is of an engine that splits any."""
        engine = self._engine
        if engine is None or not engine.enabled or self._capturing:
            return None
        rows, reason = self._rows(common), self._reason(common)
        if reason is None:
            plan = split(rows, engine.geometry, self._selection)
        else:
            plan = Plan(dense=Counter({reason: sum(row.real for row in rows)}))
        # Graphs are captured once, before a user's first step: from then on nothing is warm-up.
        plan.counted = engine.served or not warming_up(sys._getframe())
        return plan

    def _reason(self, common: Any) -> Reason | None:
        """Why all rows of a step run dense."""
        if common.causal is not True or getattr(common, "encoder_seq_lens", None) is not None:
            return Reason.NOT_CAUSAL
        # By row, the tokens that see each other; there are none in rows of text.
        ranges = getattr(common, "mm_req_doc_ranges", None)
        if ranges and any(ranges.values()):
            return Reason.OWN_MASK
        if getattr(self, "rswa_window", None) is not None:
            return Reason.SLIDING_WINDOW
        return Reason.UNKNOWN_LENGTHS if common.seq_lens_cpu_upper_bound is None else None

    def _rows(self, common: Any) -> list[Row]:
        """The rows of a step; keys are -1 where the host does not know them."""
        starts, bounds = common.query_start_loc_cpu.tolist(), common.seq_lens_cpu_upper_bound
        keys = [-1] * common.num_reqs if bounds is None else bounds.tolist()
        flags: Any = getattr(common, "is_prefilling", None)
        # A tensor on a GPU is not looked at: that would wait for it.
        known = flags is not None and flags.device.type == "cpu"
        prefilling: list[bool | None] = flags.tolist() if known else []
        # Rows that pad the batch for a graph may have no flag.
        fill = False if known else None
        prefilling += [fill] * (common.num_reqs - len(prefilling))
        return [
            Row(starts[i + 1] - starts[i], keys[i], prefilling[i]) for i in range(common.num_reqs)
        ]

    def _selection(self, keys: int) -> str:
        assert self._engine is not None
        return self._engine.state.selection_for(self._probe, keys)

    def _describe(self, plan: Plan, common: Any) -> None:
        """Give each part what its call needs, made once for all layers."""
        for part in plan.parts:
            first, last = part.rows.start, part.rows.stop
            starts = common.query_start_loc[first : last + 1]
            starts = starts - starts[0] if first else starts
            if part.selection is not None:
                part.starts = starts
                continue
            parent: Any = super()
            # A schedule made ahead would be written where that of the whole step is.
            part.metadata = parent.build(0, sliced(common, part, starts), True)
            if hasattr(part.metadata, "max_num_splits"):
                part.metadata.max_num_splits = 0

    def _count(self, plan: Plan) -> None:
        engine = self._engine
        assert engine is not None
        if not plan.counted or not (plan.sparse or plan.dense.total()):
            return
        if not engine.served and not engine.able_layers:
            reasons = sorted({str(reason) for reason in engine.dense_layers.values()})
            logger.warning("BSFA: no layer can run block-sparse: %s", "; ".join(reasons))
        engine.served = True
        for reason, rows in plan.dense.items():
            engine.calls[reason] += rows * self._able
        engine.calls["int8"] += plan.int8 * self._able
        engine.calls["exact"] += (plan.sparse - plan.int8) * self._able
        rows = plan.sparse + plan.dense.total()
        for reason in self._dense_layers.values():
            engine.calls[reason] += rows
        changed(engine)


def sliced(common: Any, part: Part, starts: Tensor) -> Any:
    """The description of a step, ``CommonAttentionMetadata``, cut down to a part's rows.

    Args:
        common: of the step.
        part: whose rows are wanted.
        starts: int32 [rows + 1] on the device, where they begin.
    """
    rows, tokens = part.rows, part.tokens
    host = common.query_start_loc_cpu[rows.start : rows.stop + 1]
    values = {
        "query_start_loc": starts,
        "query_start_loc_cpu": host - host[0],
        "seq_lens": common.seq_lens[rows],
        "num_reqs": rows.stop - rows.start,
        "num_actual_tokens": tokens.stop - tokens.start,
        "max_query_len": part.max_queries,
        "max_seq_len": part.max_keys,
        "block_table_tensor": common.block_table_tensor[rows],
        "slot_mapping": common.slot_mapping[tokens],
        "seq_lens_cpu_upper_bound": common.seq_lens_cpu_upper_bound[rows],
    }
    optional = {
        "is_prefilling": rows,
        "positions": tokens,
        "req_idx": rows,
        "dcp_local_seq_lens": rows,
        "dcp_local_seq_lens_cpu": rows,
        "dcp_local_seq_lens_cpu_upper_bound": rows,
        "_seq_lens_cpu": rows,
        "_num_computed_tokens_cpu": rows,
        "_num_computed_tokens_cache": None,
        "_token_to_req_indices_cache": None,
        "logits_indices_padded": None,
        "num_logits_indices": None,
    }
    for name, which in optional.items():
        value = getattr(common, name, None)
        if value is not None:
            values[name] = None if which is None else value[which]
    return dataclasses.replace(common, **values)


class SparseImpl:
    """Attention of one layer; before vLLM's implementation in the order of bases."""

    bsfa_engine: Engine | None = None
    bsfa_reason: Reason | None = None

    def attach(self, engine: Engine | None) -> None:
        """Tell the layer which engine it is part of.

        Args:
            engine: None for one that runs without a table.
        """
        self.bsfa_engine = engine
        self.bsfa_reason = None if engine is None else layer_reason(self, engine.head_dims)

    def pages(self, layer: Any, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [pages, page_size, kv_heads, head_dim], as views of the cache."""
        raise NotImplementedError

    def forward(  # type: ignore[no-untyped-def]
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ):
        """Attention of a step: block-sparse where its plan says so, else vLLM's own.

        Args:
            layer: vLLM's attention layer.
            query: [tokens, heads, head_dim].
            key: [tokens, kv_heads, head_dim]; they are in the cache already.
            value: as key.
            kv_cache: the layer's pages.
            attn_metadata: what the builder made of the step; None while memory is measured.
            output: [tokens, heads, head_dim], written to.
            output_scale: of a fused quantisation, which vLLM's implementation refuses.
            output_block_scale: likewise.

        Returns:
            What vLLM's implementation returns: the output.
        """
        parent: Any = super()
        plan: Plan | None = getattr(attn_metadata, PLAN, None)
        index = None if plan is None else layer_index(layer.layer_name)
        engine = self.bsfa_engine
        fused = output_scale is not None or output_block_scale is not None
        if (
            plan is None
            or engine is None
            or index is None
            or index >= engine.layers
            or self.bsfa_reason is not None
            or fused
        ):
            return parent.forward(
                *(layer, query, key, value, kv_cache, attn_metadata, output),
                *(output_scale, output_block_scale),
            )
        k, v = self.pages(layer, kv_cache)
        thresholds = engine.state.layer_thresholds(index, query.device)
        # The layer's parameter, of this rank's heads; it is loaded after the layer was made.
        sinks: Tensor | None = getattr(self, "sinks", None)
        sinks = None if sinks is None else sinks.float()
        attend: Callable[..., tuple[Tensor, Tensor]] = block_sparse_attention
        kept: list[Tensor] = []
        for part in plan.parts:
            tokens = part.tokens
            if part.selection is None:
                parent.forward(
                    layer,
                    query[tokens],
                    None if key is None else key[tokens],
                    None if value is None else value[tokens],
                    *(kv_cache, part.metadata, output[tokens]),
                )
                continue
            out, blocks = attend(
                query[tokens],
                k,
                v,
                thresholds,
                scale=self.scale,  # type: ignore[attr-defined]
                sinks=sinks,
                cu_seqlens_q=part.starts,
                block_table=attn_metadata.block_table[part.rows],
                seqused_k=attn_metadata.seq_lens[part.rows],
                max_seqlen_k=part.max_keys,
                return_kept=True,
                **engine.options(part.selection),
            )
            output[tokens].copy_(out.view_as(output[tokens]))
            kept.append(blocks)
        if not plan.counted:
            return output
        lengths = [each for part in plan.parts if part.selection for each in part.lengths]
        selection = "int8" if plan.int8 else "exact"
        engine.state.statistics.count_sparse(index, kept, lengths, engine.geometry, selection)
        return output
