"""The states of layers that come in as inputs, and go out brought up to date."""

from __future__ import annotations

from typing import Any

import torch

from converters.onnx.format import (
    COLUMNS,
    KEY,
    RECURRENCE,
    VALUE,
    StateName,
    past_name,
    present_name,
)
from converters.onnx.write.tracing import Dimension, Tracer, Value
from edkm_export.decoder.config import DecoderConfig
from edkm_export.decoder.states import Columns, KeysValues, layer_states

__all__ = ["BATCH", "NEW", "PAST", "TOTAL", "GraphState", "GrowingCache", "graph_states"]

BATCH, NEW, PAST, TOTAL = (
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "total_sequence_length",
)
"""Names of the open sizes."""

GraphState = tuple[int, StateName, tuple[Dimension, ...], tuple[Dimension, ...]]
"""Layer, what it is, and its shapes as an input and as an output."""


def graph_states(config: DecoderConfig) -> list[GraphState]:
    """The states of a decoder in the order of the inputs of a graph."""
    found: list[GraphState] = []
    for layer in range(config.num_layers):
        for state in layer_states(config, layer):
            if isinstance(state, KeysValues):
                heads, width = state.heads, state.head_dim
                past, present = (BATCH, heads, PAST, width), (BATCH, heads, TOTAL, width)
                found += [(layer, KEY, past, present), (layer, VALUE, past, present)]
            elif isinstance(state, Columns):
                shape: tuple[Dimension, ...] = (BATCH, state.channels, state.width)
                found.append((layer, COLUMNS, shape, shape))
            else:
                shape = (BATCH, state.heads, state.key_dim, state.value_dim)
                found.append((layer, RECURRENCE, shape, shape))
    return found


class GrowingCache:
    """The cache of one forward pass; see `decoder.states.Cache`.

    Args:
        tracer: of the graph.
        config: of the decoder.

    Attributes:
        present: {name of an output of the graph: name of its value}.
    """

    def __init__(self, tracer: Tracer, config: DecoderConfig) -> None:
        self._tracer = tracer
        self._shapes = {(layer, what): shape for layer, what, shape, _ in graph_states(config)}
        self.present: dict[str, str] = {}

    def past(self, what: StateName, layer: int) -> Value:
        """An input of the graph."""
        dtype = torch.float32 if what == RECURRENCE else self._tracer.dtype
        return Value(self._tracer, past_name(layer, what), self._shapes[layer, what], dtype)

    def update(self, layer: int, keys: Value, values: Value) -> tuple[Value, Value]:
        """Append the new ones [batch, kv_heads, new, head_dim]."""
        return self._grown(layer, KEY, keys, 2), self._grown(layer, VALUE, values, 2)

    def extend(self, layer: int, columns: Value) -> Value:
        """New columns [batch, channels, new] after those that came in; the last ones go out."""
        both, width = self._grown(layer, COLUMNS, columns, 2), self._shapes[layer, COLUMNS][2]
        assert isinstance(width, int)
        self.present[present_name(layer, COLUMNS)] = both[..., -width:].name
        return both

    def matrices(self, layer: int) -> Value:
        """The recurrence that came in, float32."""
        return self.past(RECURRENCE, layer)

    def keep(self, layer: int, matrices: Value) -> None:
        """The recurrence that goes out."""
        self.present[present_name(layer, RECURRENCE)] = matrices.name

    def _grown(self, layer: int, what: StateName, new: Value, axis: int) -> Value:
        parts: Any = (self.past(what, layer), new)
        both: Any = torch.cat(parts, dim=axis)
        self.present[present_name(layer, what)] = both.name
        return both  # type: ignore[no-any-return]
