"""Rotary positions as one operator instead of a dozen nodes: onnxruntime's own, or that of opset 23.

onnxruntime, docs/ContribOperators.md; onnx/docs/Operators.md. They differ in the order of their inputs only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from converters.onnx.format import POSITION_IDS
from converters.onnx.write.builder import CONTRIB
from converters.onnx.write.tracing import Tracer, Value, half_table
from edkm_export.decoder.attention import Attention
from edkm_export.decoder.positions import PositionTables, table_of_queries

__all__ = ["Rotation", "replace_rotation"]


def replace_rotation(module: torch.nn.Module, tracer: Tracer, tables: PositionTables) -> Rotation | None:
    """Let an attention of a decoder rotate with RotaryEmbedding, if it rotates and its tables hold each angle twice.

    Returns:
        What rotates its queries and keys from now on; None when it keeps its own.
    """
    if not isinstance(module, Attention) or not module.rotary_dim:
        return None
    halves = [
        half_table(tables.get_buffer(f"{which}_{kind}"), interleaved=module.interleaved)
        for kind in (table_of_queries(tables.tables, module.kind), tables.tables[module.kind])
        for which in ("cos", "sin")
    ]
    if any(half is None for half in halves):
        return None
    rotation = Rotation(module, tracer, halves[:2], halves[2:])
    module.rotate_queries = rotation.queries  # type: ignore[method-assign, assignment]
    module.rotate_keys = rotation.keys  # type: ignore[method-assign, assignment]
    return rotation


class Rotation:
    """Turns the first `rotary_dim` channels of each head.

    Args:
        module: the attention.
        tracer: of the graph.
        queries: cosines and sines, float32 [positions, rotary_dim / 2] each.
        keys: those of the keys.
    """

    def __init__(self, module: Attention, tracer: Tracer, queries: list[Any], keys: list[Any]) -> None:
        self._module, self._tracer = module, tracer
        dtype = np.float16 if tracer.dtype == torch.float16 else np.float32
        self._of_queries: list[NDArray[Any]] = [half.astype(dtype) for half in queries]
        self._of_keys: list[NDArray[Any]] = [half.astype(dtype) for half in keys]

    @property
    def is_whole(self) -> bool:
        """Every channel of a head rotates."""
        return self._module.rotary_dim == self._module.head_dim

    def queries(self, x: Value, rotary: object = None, scale: float = 1.0) -> Value:
        """Queries [batch, heads, new, head_dim] or [batch, new, heads * head_dim] -> the same.

        Args:
            x: the queries.
            rotary: of the context, as an attention gives it; the gathered rows of the tables are not needed.
            scale: factor on the channels that rotate.
        """
        return self._turn(x, self._of_queries, scale)

    def keys(self, x: Value, rotary: object = None) -> Value:
        """The same of keys."""
        return self._turn(x, self._of_keys)

    def _turn(self, x: Value, halves: list[NDArray[Any]], scale: float = 1.0) -> Value:
        module, own = self._module, self._tracer.weights.contrib
        part: dict[str, int] = {}
        if not self.is_whole:
            part["rotary_embedding_dim"] = module.rotary_dim
        if part or not own:
            part["num_heads"] = int(x.shape[1] if len(x.shape) == 4 else int(x.shape[2]) // module.head_dim)
        if module.interleaved:
            part["interleaved"] = 1
        graph = self._tracer.graph
        tables = [graph.constant(half) for half in halves]
        if scale != 1:
            factor = graph.constant(scale, halves[0].dtype)
            tables = [graph.node("Mul", table, factor) for table in tables]
        inputs = (POSITION_IDS, *tables) if own else (*tables, POSITION_IDS)
        domain = CONTRIB if own else ""
        return self._tracer.emit(
            "RotaryEmbedding", x.name, *inputs, shape=x.shape, dtype=x.dtype, domain=domain, **part
        )
