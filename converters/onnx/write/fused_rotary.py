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
from edkm_export.decoder.positions import PositionTables

__all__ = ["Rotation", "replace_rotation"]


def replace_rotation(module: torch.nn.Module, tracer: Tracer, tables: PositionTables) -> Rotation | None:
    """Let an attention of a decoder rotate with RotaryEmbedding, if it rotates and its tables have two equal halves.

    Returns:
        Its `rotate` from now on; None when it keeps its own.
    """
    if not isinstance(module, Attention) or module.kind not in tables.tables:
        return None
    kind = tables.tables[module.kind]
    halves = [half_table(tables.get_buffer(f"{which}_{kind}")) for which in ("cos", "sin")]
    if any(half is None for half in halves):
        return None
    rotation = Rotation(module, tracer, halves)
    module.rotate = rotation  # type: ignore[method-assign, assignment]
    return rotation


class Rotation:
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

    @property
    def is_whole(self) -> bool:
        """Every channel of a head rotates."""
        return self._module.rotary_dim == self._module.head_dim

    def __call__(self, x: Value, cos: Value, sin: Value) -> Value:
        """`turn` as an attention calls it; the gathered rows of the tables are not needed."""
        return self.turn(x)

    def turn(self, x: Value, scale: float = 1.0) -> Value:
        """x [batch, heads, new, head_dim] or [batch, new, heads * head_dim] -> the same.

        Args:
            x: queries or keys.
            scale: of the channels that rotate; the tables are multiplied by it.
        """
        module, own = self._module, self._tracer.weights.contrib
        part: dict[str, int] = {}
        if not self.is_whole:
            part["rotary_embedding_dim"] = module.rotary_dim
        if part or not own:
            part["num_heads"] = int(x.shape[1] if len(x.shape) == 4 else int(x.shape[2]) // module.head_dim)
        graph = self._tracer.graph
        tables = [graph.constant(half) for half in self._halves]
        if scale != 1:
            factor = graph.constant(scale, self._halves[0].dtype)
            tables = [graph.node("Mul", table, factor) for table in tables]
        inputs = (POSITION_IDS, *tables) if own else (*tables, POSITION_IDS)
        domain = CONTRIB if own else ""
        return self._tracer.emit(
            "RotaryEmbedding", x.name, *inputs, shape=x.shape, dtype=x.dtype, domain=domain, **part
        )
