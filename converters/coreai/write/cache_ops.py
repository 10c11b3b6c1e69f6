"""Keys and values in states of the program: one functional update a layer, and one copy at the end.

In-place assignment to a slice converts, but fails in Apple's runtime; the update is therefore an operator of our own,
lowered to one `slice_update`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from converters.coreai.backend import load_authoring

__all__ = ["FunctionalCache", "register_cache"]


@torch.library.custom_op("edkm::cache_update", mutates_args=())
def _cache_update(state: Tensor, new: Tensor, layer: int, begin: int, end: int) -> Tensor:
    result = state.clone()
    result[layer : layer + 1, :, :, begin:end] = new[None]
    return result


@_cache_update.register_fake
def _(state: Tensor, new: Tensor, layer: int, begin: int, end: int) -> Tensor:
    return torch.empty_like(state)


class FunctionalCache:
    """The cache of one forward pass, for tracing; see `decoder.context.Cache`.

    Args:
        keys, values: the states, [layers, 1, kv_heads, length, head_dim].
        begin: position of the first new token; a number or a traced integer.
        end: position after the last new token.
        visible: positions to return, from 0.
    """

    def __init__(self, keys: Tensor, values: Tensor, begin: Any, end: Any, visible: Any) -> None:
        self.keys, self.values = keys, values
        self._begin, self._end, self._visible = begin, end, visible

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [1, kv_heads, new, head_dim] -> those of all visible positions."""
        self.keys, all_keys = self._one(self.keys, layer, keys)
        self.values, all_values = self._one(self.values, layer, values)
        return all_keys, all_values

    def _one(self, state: Tensor, layer: int, new: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.ops.edkm.cache_update(state, new.to(state.dtype), layer, self._begin, self._end)
        seen = state.narrow(0, layer, 1).narrow(3, 0, self._visible).squeeze(0)
        return state, seen.to(new.dtype)


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
