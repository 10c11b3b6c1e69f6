"""The states of layers in states of the program: one functional update a layer, and one copy at the end.

In-place assignment to a slice converts, but fails in Apple's runtime; the update is therefore an operator of our own,
lowered to one `slice_update`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from converters.coreai.backend import load_authoring
from converters.coreai.format import (
    COLUMN_STATES,
    KEY_CACHE,
    KEY_SCALES,
    RECURRENT_STATES,
    VALUE_CACHE,
    VALUE_SCALES,
)
from edkm_export.decoder.config import DecoderConfig
from edkm_export.decoder.int8_states import from_int8, to_int8
from edkm_export.decoder.states import Columns, KeysValues, Recurrence, layers_with

__all__ = ["ColumnCache", "FunctionalCache", "register_cache"]


@torch.library.custom_op("edkm::cache_update", mutates_args=())
def _cache_update(state: Tensor, new: Tensor, layer: int, begin: int, end: int) -> Tensor:
    result = state.clone()
    result[layer : layer + 1, :, :, begin:end] = new[None]
    return result


@_cache_update.register_fake
def _(state: Tensor, new: Tensor, layer: int, begin: int, end: int) -> Tensor:
    return torch.empty_like(state)


@torch.library.custom_op("edkm::column_update", mutates_args=())
def _column_update(state: Tensor, new: Tensor, layer: int, step: Tensor) -> Tensor:
    begin, result = int(step), state.clone()
    result[layer : layer + 1, :, :, :, begin : begin + new.shape[-1]] = new[None]
    return result


@_column_update.register_fake
def _(state: Tensor, new: Tensor, layer: int, step: Tensor) -> Tensor:
    return torch.empty_like(state)


@torch.library.custom_op("edkm::layer_update", mutates_args=())
def _layer_update(state: Tensor, new: Tensor, place: int) -> Tensor:
    result = state.clone()
    result[place : place + 1] = new[None]
    return result


@_layer_update.register_fake
def _(state: Tensor, new: Tensor, place: int) -> Tensor:
    return torch.empty_like(state)


_SCALES = {KEY_CACHE: KEY_SCALES, VALUE_CACHE: VALUE_SCALES}


class FunctionalCache:
    """The cache of one forward pass, for tracing; see `decoder.states.Cache`.

    Args:
        config: of the decoder.
        states: by name: keys and values [layers that attend, 1, kv_heads, length, head_dim], as int8 with scales
            [layers that attend, 1, kv_heads, length, 1]; columns [layers, 1, width, channels] and recurrences float32
            [layers, 1, heads, key_dim, value_dim] where there are.
        begin: position of the first new token; a number or a traced integer.
        end: position after the last new token.
        visible: positions to return, from 0.

    Attributes:
        states: after the updates so far.
    """

    def __init__(
        self, config: DecoderConfig, states: dict[str, Tensor], begin: Any, end: Any, visible: Any
    ) -> None:
        self.states = dict(states)
        self._places = {kind: layers_with(config, kind) for kind in (KeysValues, Columns, Recurrence)}
        self._begin, self._end, self._visible = begin, end, visible

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [1, kv_heads, new, head_dim] -> those of all visible positions."""
        place = self._places[KeysValues].index(layer)
        return self._held(KEY_CACHE, place, keys), self._held(VALUE_CACHE, place, values)

    def _held(self, name: str, place: int, new: Tensor) -> Tensor:
        if _SCALES[name] not in self.states:
            return self._grown(name, place, new)
        codes, scales = to_int8(new)
        return from_int8(self._grown(name, place, codes), self._grown(_SCALES[name], place, scales))

    def _grown(self, name: str, place: int, new: Tensor) -> Tensor:
        state, (_, heads, _, size) = self.states[name], new.shape
        if (heads, size) != (state.shape[2], state.shape[4]):  # another layer's heads are larger
            new = F.pad(new, (0, state.shape[4] - size, 0, 0, 0, state.shape[2] - heads))
        state = torch.ops.edkm.cache_update(state, new.to(state.dtype), place, self._begin, self._end)
        self.states[name] = state
        seen: Tensor = state.narrow(0, place, 1).narrow(3, 0, self._visible).squeeze(0)
        if heads != state.shape[2]:
            seen = seen.narrow(1, 0, heads)
        if size != state.shape[4]:
            seen = seen.narrow(3, 0, size)
        return seen.to(new.dtype)

    def extend(self, layer: int, columns: Tensor) -> Tensor:
        """Columns [1, channels, new] -> those kept before and the new ones, [1, channels, width + new]."""
        state, place = self.states[COLUMN_STATES], self._places[Columns].index(layer)
        before = state.narrow(0, place, 1).squeeze(0).transpose(1, 2)
        both = torch.cat((before.to(columns.dtype), columns), 2)
        last = both.narrow(2, columns.shape[2], state.shape[2]).transpose(1, 2)
        self.states[COLUMN_STATES] = torch.ops.edkm.layer_update(state, last.to(state.dtype), place)
        return both

    def matrices(self, layer: int) -> Tensor:
        """The recurrence so far, float32 [1, heads, key_dim, value_dim]."""
        place = self._places[Recurrence].index(layer)
        return self.states[RECURRENT_STATES].narrow(0, place, 1).squeeze(0)

    def keep(self, layer: int, matrices: Tensor) -> None:
        """Store float32 [1, heads, key_dim, value_dim]."""
        state, place = self.states[RECURRENT_STATES], self._places[Recurrence].index(layer)
        self.states[RECURRENT_STATES] = torch.ops.edkm.layer_update(state, matrices, place)


class ColumnCache:
    """The cache of the static engine, for tracing: positions are on the last axis, and all are visible.

    Args:
        keys: the state, [layers, 1, kv_heads * head_dim, 1, length].
        values: as the keys.
        kv_heads: number of key/value heads.
        step: int32 [1], position of the first new token.
    """

    def __init__(self, keys: Tensor, values: Tensor, kv_heads: int, step: Tensor) -> None:
        self.keys, self.values = keys, values
        self._heads, self._step = kv_heads, step

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [1, kv_heads, new, head_dim] -> those of all positions."""
        self.keys, all_keys = self._one(self.keys, layer, keys)
        self.values, all_values = self._one(self.values, layer, values)
        return all_keys, all_values

    def _one(self, state: Tensor, layer: int, new: Tensor) -> tuple[Tensor, Tensor]:
        width = new.shape[1] * new.shape[3]
        columns = new.transpose(2, 3).reshape(1, width, 1, new.shape[2]).to(state.dtype)
        state = torch.ops.edkm.column_update(state, columns, layer, self._step)
        seen = state.narrow(0, layer, 1).reshape(1, self._heads, width // self._heads, state.shape[4])
        return state, seen.transpose(2, 3).to(new.dtype)


def register_cache(converter: Any) -> None:
    """Tell a `TorchConverter` how to update a state."""
    ops = load_authoring().ops

    @converter.register_torch_lowering("edkm::cache_update.default")  # type: ignore[untyped-decorator]
    def lower(values: dict[Any, Any], node: Any, loc: Any) -> Any:
        state, new = values[node.args[0].name], values[node.args[1].name]
        layer, begin, end = node.args[2:]

        def position(value: Any) -> Any:
            if not hasattr(value, "name"):
                return ops.constant([value])
            found = values[value.name]
            return found if found.type.shape else ops.reshape(found, np.array([1], np.uint32))

        shape = state.type.shape
        first = ops.concat(0, [ops.constant([layer, 0, 0]), position(begin), ops.constant([0])])
        last = ops.concat(
            0, [ops.constant([layer + 1, shape[1], shape[2]]), position(end), ops.constant([shape[4]])]
        )
        return ops.slice_update(state, first, last, [1] * 5, ops.expand_dims(new, [0]))

    @converter.register_torch_lowering("edkm::layer_update.default")  # type: ignore[untyped-decorator]
    def lower_layer(values: dict[Any, Any], node: Any, loc: Any) -> Any:
        state, new = values[node.args[0].name], values[node.args[1].name]
        place, shape = node.args[2], list(state.type.shape)
        first = ops.constant([place, *[0] * (len(shape) - 1)])
        last = ops.constant([place + 1, *shape[1:]])
        return ops.slice_update(state, first, last, [1] * len(shape), ops.expand_dims(new, [0]))

    @converter.register_torch_lowering("edkm::column_update.default")  # type: ignore[untyped-decorator]
    def lower_columns(values: dict[Any, Any], node: Any, loc: Any) -> Any:
        state, new, step = (values[node.args[place].name] for place in (0, 1, 3))
        layer, width = node.args[2], state.type.shape[2]
        count = ops.slice_(ops.cast(ops.get_shape(new), dtype=np.int32), [3], [4], [1])
        first = ops.concat(0, [ops.constant([layer, 0, 0, 0]), step])
        last = ops.concat(0, [ops.constant([layer + 1, 1, width, 1]), ops.broadcasting_add(step, count)])
        return ops.slice_update(state, first, last, [1] * 5, ops.expand_dims(new, [0]))
