"""Attention and its growing cache as one standard operator (onnx/docs/Operators.md, Attention, opset 23)."""

from __future__ import annotations

from typing import Any

import torch

from converters.onnx.format import KEY, VALUE, present_name
from converters.onnx.write.fused_rotary import Rotation
from converters.onnx.write.growing_cache import TOTAL, GrowingCache
from converters.onnx.write.tracing import Dimension, Tracer, Value
from edkm_export.decoder.attention import Attention
from edkm_export.decoder.context import Context
from edkm_export.decoder.projections import project

__all__ = ["ATTENTION_OPSET", "replace_attention"]

ATTENTION_OPSET = 23


def replace_attention(module: torch.nn.Module, tracer: Tracer, rotation: Rotation | None) -> None:
    """Let an attention of a decoder be one operator, if it is one that caps no scores, gates no output and has keys and
    values of its own: the operator appends to what it reads.

    Args:
        module: of the decoder.
        tracer: of the graph.
        rotation: its `rotate`, which takes heads side by side; None: it has none, or its own.
    """
    if (
        not isinstance(module, Attention)
        or module.cap is not None
        or module.gates
        or module.source is not None
    ):
        return
    if rotation or not module.rotary_dim:
        module.forward = _FusedAttention(module, tracer, rotation)  # type: ignore[method-assign, assignment]


class _FusedAttention:
    """Heads stay side by side in the last axis: nothing is split, turned, repeated or joined.

    Args:
        module: the decoder's attention.
        tracer: of the graph.
        rotation: of queries and keys; None: they have no positions.
    """

    def __init__(self, module: Attention, tracer: Tracer, rotation: Rotation | None) -> None:
        self._module, self._tracer, self._rotation = module, tracer, rotation
        self._scale = module.query_scale * module.head_dim**-0.5
        # Scaled by its tables of rotation a query needs no scale in the operator, and with a scale of 1 onnxruntime
        # multiplies a single query without a copy of the keys.
        self._turned_scale = 1.0
        if tracer.weights.contrib and rotation is not None and rotation.is_whole and not module.norms_last:
            self._scale, self._turned_scale = 1.0, self._scale

    def __call__(self, x: Value, context: Context, cache: GrowingCache) -> Value:
        """x [batch, new, hidden] -> [batch, new, hidden]."""
        module, graph = self._module, self._tracer.graph
        names = module.names
        mask: Any = context.masks[module.kind]
        projected: Any = project(module, module.inputs, module.sizes, x)  # type: ignore[arg-type]
        queries, keys, values = projected[0], projected[1], projected[-1]
        if module.value_norm is not None:
            values = self._each_head(module.value_norm, values, module.kv_heads)
        if module.norms and not module.norms_last:
            queries, keys = self._normed(queries, keys)
        if self._rotation is not None:
            queries = self._rotation.queries(queries, scale=self._turned_scale)
            keys = self._rotation.keys(keys)
        if module.norms and module.norms_last:
            queries, keys = self._normed(queries, keys)
        layer = module.layer
        mixed = graph.unique("Attention")
        cache.present |= {present_name(layer, what): f"{mixed}.{what}" for what in (KEY, VALUE)}
        graph.append(
            "Attention",
            (
                queries.name, keys.name, values.name, mask.name,
                cache.past(KEY, layer).name, cache.past(VALUE, layer).name,
            ),
            (mixed, f"{mixed}.key", f"{mixed}.value"),
            q_num_heads=module.heads,
            kv_num_heads=module.kv_heads,
            scale=self._scale,
        )  # fmt: skip
        if module.lends:
            every: tuple[Dimension, ...] = (x.shape[0], module.kv_heads, TOTAL, module.head_dim)
            lent: Any = [Value(self._tracer, f"{mixed}.{what}", every, x.dtype) for what in (KEY, VALUE)]
            context.lent[layer] = tuple(lent)
        value = Value(self._tracer, mixed, (*x.shape[:2], module.heads * module.head_dim), x.dtype)
        return module.get_submodule(names.attention_output)(value)  # type: ignore[no-any-return]

    def _normed(self, queries: Value, keys: Value) -> tuple[Value, Value]:
        module = self._module
        query_norm, key_norm = module.query_norm, module.key_norm
        if module.norms != "head":
            return query_norm(queries), key_norm(keys)
        return (
            self._each_head(query_norm, queries, module.heads),
            self._each_head(key_norm, keys, module.kv_heads),
        )

    def _each_head(self, norm: torch.nn.Module, x: Value, heads: int) -> Value:
        """Norm of [batch, new, heads * head_dim], head by head."""
        batch, new, width = x.shape
        split = x.reshape(batch, new, heads, self._module.head_dim)
        return norm(split).reshape(batch, new, width)  # type: ignore[no-any-return]
