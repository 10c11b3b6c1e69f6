"""Rotary positions as one operator instead of a dozen nodes: onnxruntime's own, or that of opset 23.

onnxruntime, docs/ContribOperators.md; onnx/docs/Operators.md. They differ in the order of their inputs only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from converters.onnx.builder import CONTRIB
from converters.onnx.tracing import Tracer, Value, half_table
from edkm_export.models.attention import Attention
from edkm_export.models.positions import PositionTables

__all__ = ["replace_rotation"]


def replace_rotation(module: torch.nn.Module, tracer: Tracer, tables: PositionTables) -> bool:
    """Let an attention of a decoder rotate with RotaryEmbedding, if it rotates and its tables have two equal halves.

    Returns:
        Whether it does now.
    """
    if not isinstance(module, Attention) or module.kind not in tables.tables:
        return False
    kind = tables.tables[module.kind]
    halves = [half_table(tables.get_buffer(f"{which}_{kind}")) for which in ("cos", "sin")]
    if any(half is None for half in halves):
        return False
    module.rotate = _Rotation(module, tracer, halves)  # type: ignore[method-assign, assignment]
    return True


class _Rotation:
    """Turns the first `rotary_dim` channels of each head.

    Args:
        module: the attention.
        tracer: of the graph.
        halves: cosines and sines, float32 [positions, rotary_dim / 2] each.
    """

    def __init__(self, module: Attention, tracer: Tracer, halves: list[Any]) -> None:
        self._module, self._tracer = module, tracer
        dtype = np.float16 if tracer.dtype == torch.float16 else np.float32
        self._halves: list[NDArray[Any]] = [half.astype(dtype) for half in halves]

    def __call__(self, x: Value, cos: Value, sin: Value) -> Value:
        """x [batch, heads, new, head_dim] or [batch, new, heads * head_dim] -> the same.

        Gathered rows of the tables are not needed.
        """
        module, own = self._module, self._tracer.weights.contrib
        part: dict[str, int] = {}
        if module.rotary_dim != module.head_dim:
            part["rotary_embedding_dim"] = module.rotary_dim
        if part or not own:
            part["num_heads"] = int(x.shape[1] if len(x.shape) == 4 else int(x.shape[2]) // module.head_dim)
        tables = [self._tracer.graph.constant(half) for half in self._halves]
        inputs = ("position_ids", *tables) if own else (*tables, "position_ids")
        domain = CONTRIB if own else ""
        return self._tracer.emit(
            "RotaryEmbedding", x.name, *inputs, shape=x.shape, dtype=x.dtype, domain=domain, **part
        )
