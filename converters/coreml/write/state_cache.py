"""Keys and values kept in a state of the program."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from converters.coreml.format import KEY_CACHE, VALUE_CACHE
from edkm_export.decoder.config import DecoderConfig

__all__ = ["StateCache", "add_states", "state_shape", "state_types"]


def state_shape(
    config: DecoderConfig, layers: int, context: int, width: int | None = None
) -> tuple[int, ...]:
    """[layers, kv_heads, context, width]; a width above `head_dim` leaves the last channels unused."""
    return (layers, config.num_kv_heads, context, config.head_dim if width is None else width)


def add_states(module: nn.Module, shape: tuple[int, ...]) -> None:
    """Give a module the buffers that become the states."""
    for name in (KEY_CACHE, VALUE_CACHE):
        module.register_buffer(name, torch.zeros(shape, dtype=torch.float16))


def state_types(shape: tuple[int, ...]) -> list[Any]:
    """`coremltools.StateType` of both states."""
    import coremltools as ct
    import numpy as np

    return [
        ct.StateType(ct.TensorType(shape=shape, dtype=np.float16), name=name)
        for name in (KEY_CACHE, VALUE_CACHE)
    ]


class StateCache:
    """The cache of one forward pass, for tracing; see `models.context.Cache`.

    Args:
        module: holds the buffers of `add_states`.
        first_layer: number of the model's layer that is the first in the states.
        begin: position of the first new token; a number or a traced integer tensor.
        end: position after the last new token.
        visible: positions to return, from 0; None: the whole context.
    """

    def __init__(
        self, module: nn.Module, first_layer: int, begin: Any, end: Any, visible: Any | None = None
    ) -> None:
        self._keys, self._values = module.get_buffer(KEY_CACHE), module.get_buffer(VALUE_CACHE)
        self._first, self._begin, self._end, self._visible = first_layer, begin, end, visible

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [1, kv_heads, new, head_dim] -> those of all visible positions."""
        return self._one(self._keys, layer, keys), self._one(self._values, layer, values)

    def _one(self, state: Tensor, layer: int, new: Tensor) -> Tensor:
        index, size = layer - self._first, new.shape[-1]
        padded = F.pad(new, (0, state.shape[-1] - size)) if state.shape[-1] > size else new
        # The layer axis is sliced, not indexed: it takes the place of the batch.
        state[index : index + 1, :, self._begin : self._end, :] = padded.to(state.dtype)
        return state[index : index + 1, :, : self._visible, :size].to(new.dtype)
