"""The states of layers that come in as inputs, and go out brought up to date."""

from __future__ import annotations

from typing import Any

import torch

from converters.onnx.format import (
    COLUMNS,
    KEY,
    KEY_SCALE,
    RECURRENCE,
    VALUE,
    VALUE_SCALE,
    StateName,
    past_name,
    present_name,
)
from converters.onnx.write.tracing import Dimension, Tracer, Value
from edkm_export.decoder.config import DecoderConfig
from edkm_export.decoder.int8_states import from_int8, to_int8
from edkm_export.decoder.states import Columns, KeysValues, layer_states
from edkm_export.kv_cache import FLOAT, INT8, KVCache

__all__ = ["BATCH", "NEW", "PAST", "TOTAL", "GraphState", "GrowingCache", "graph_states", "state_dtype"]

BATCH, NEW, PAST, TOTAL = (
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "total_sequence_length",
)
"""Names of the open sizes."""

GraphState = tuple[int, StateName, tuple[Dimension, ...], tuple[Dimension, ...]]
"""Layer, what it is, and its shapes as an input and as an output."""


_SCALES: dict[StateName, StateName] = {KEY: KEY_SCALE, VALUE: VALUE_SCALE}


def graph_states(config: DecoderConfig, kv_cache: KVCache = FLOAT) -> list[GraphState]:
    """The states of a decoder in the order of the inputs of a graph.

    Args:
        config: of the decoder.
        kv_cache: how keys and values are held; as int8, the scales of each stand behind it.
    """
    found: list[GraphState] = []
    for layer in range(config.num_layers):
        for state in layer_states(config, layer):
            if isinstance(state, KeysValues):
                heads, width = state.heads, state.head_dim
                past, present = (BATCH, heads, PAST, width), (BATCH, heads, TOTAL, width)
                for what, scale in _SCALES.items():
                    found.append((layer, what, past, present))
                    if kv_cache == INT8:
                        found.append((layer, scale, (*past[:-1], 1), (*present[:-1], 1)))
            elif isinstance(state, Columns):
                shape: tuple[Dimension, ...] = (BATCH, state.channels, state.width)
                found.append((layer, COLUMNS, shape, shape))
            else:
                shape = (BATCH, state.heads, state.key_dim, state.value_dim)
                found.append((layer, RECURRENCE, shape, shape))
    return found


def state_dtype(what: StateName, kv_cache: KVCache, dtype: torch.dtype) -> torch.dtype:
    """Of a state, in a graph with activations of `dtype`."""
    if what == RECURRENCE:
        return torch.float32
    return torch.int8 if kv_cache == INT8 and what in _SCALES else dtype


class GrowingCache:
    """The cache of one forward pass; see `decoder.states.Cache`.

    Args:
        tracer: of the graph.
        config: of the decoder.
        kv_cache: how keys and values are held.

    Attributes:
        present: {name of an output of the graph: name of its value}.
    """

    def __init__(self, tracer: Tracer, config: DecoderConfig, kv_cache: KVCache = FLOAT) -> None:
        self._tracer, self._kv_cache = tracer, kv_cache
        self._shapes = {(layer, what): shape for layer, what, shape, _ in graph_states(config, kv_cache)}
        self.present: dict[str, str] = {}

    def past(self, what: StateName, layer: int) -> Value:
        """An input of the graph."""
        dtype = state_dtype(what, self._kv_cache, self._tracer.dtype)
        return Value(self._tracer, past_name(layer, what), self._shapes[layer, what], dtype)

    def update(self, layer: int, keys: Value, values: Value) -> tuple[Value, Value]:
        """Append the new ones [batch, kv_heads, new, head_dim]."""
        return self._held(layer, KEY, keys), self._held(layer, VALUE, values)

    def _held(self, layer: int, what: StateName, new: Value) -> Value:
        """All keys or values of a layer as attention reads them."""
        if self._kv_cache == FLOAT:
            return self._grown(layer, what, new, 2)
        found: Any = new
        codes, scales = to_int8(found)
        held: Any = self._grown(layer, what, codes, 2), self._grown(layer, _SCALES[what], scales, 2)  # type: ignore[arg-type]
        return from_int8(*held)  # type: ignore[return-value]

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
