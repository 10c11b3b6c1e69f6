"""The states of layers, kept in states of the program.

Core ML has states of float16 only. A recurrence needs float32 (see `decoder.linear_attention`), and is held as a sum:
its value rounded to float16, and what that leaves, 2,048 times larger. Twice eleven bits are nearly those of float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from converters.coreml.format import COLUMN_CACHE, KEY_CACHE, RECURRENCE_CACHE, REMAINDER_CACHE, VALUE_CACHE
from edkm_export.decoder.config import DecoderConfig
from edkm_export.decoder.states import Columns, KeysValues, Recurrence, layer_states, layers_with

__all__ = ["FLOAT32_MODULES", "StateCache", "StateLayout"]

FLOAT32_MODULES = frozenset({"Rule", "Split", "Joined"})
"""Types of the modules whose arithmetic is not lowered to float16."""

_REMAINDER = 2048.0  # a value rounded to 11 bits leaves at most a 2,048th of it
_SPLITTER = 2.0**13 + 1


@dataclass(frozen=True)
class StateLayout:
    """The states of a program for some layers.

    Attributes:
        shapes: by name, [layers with this state, ...].
        places: {kind of state: {number of a layer: its place on the first axis}}.
    """

    shapes: dict[str, tuple[int, ...]]
    places: dict[type, dict[int, int]]

    @classmethod
    def of(
        cls, config: DecoderConfig, context: int, layers: slice = slice(None), multiple: int = 1
    ) -> StateLayout:
        """The layout.

        Args:
            config: of the decoder.
            context: most positions that keys and values hold.
            layers: of the program; the default: all.
            multiple: the last two axes are made larger to multiples of it. What is added is not used.
        """
        places: dict[type, dict[int, int]] = {
            kind: {layer: place for place, layer in enumerate(layers_with(config, kind, layers))}
            for kind in (KeysValues, Columns, Recurrence)
        }
        shapes: dict[str, tuple[int, ...]] = {}
        names: tuple[str, ...]
        sizes: tuple[int, ...]
        for layer in range(config.num_layers)[layers]:
            for state in layer_states(config, layer):
                count = len(places[type(state)])
                if isinstance(state, KeysValues):
                    names, sizes = (KEY_CACHE, VALUE_CACHE), (state.heads, context, state.head_dim)
                elif isinstance(state, Columns):
                    names, sizes = (COLUMN_CACHE,), (state.channels, state.width)
                else:
                    names = (RECURRENCE_CACHE, REMAINDER_CACHE)
                    sizes = (state.heads, state.key_dim, state.value_dim)
                padded = (*sizes[:-2], *(-(-size // multiple) * multiple for size in sizes[-2:]))
                for name in names:  # heads of several sizes share a state, which is as large as the largest
                    before = shapes.get(name, (0,) * (1 + len(padded)))
                    shapes[name] = tuple(map(max, before, (count, *padded)))
        return cls(shapes, places)

    def add_to(self, module: nn.Module) -> None:
        """Give a module the buffers that become the states, and what a `StateCache` of it computes with."""
        for name, shape in self.shapes.items():
            module.register_buffer(name, torch.zeros(shape, dtype=torch.float16))
        if self.places[Recurrence]:
            module.add_module("split", Split())
            module.add_module("joined", Joined())

    def types(self) -> list[Any]:
        """`coremltools.StateType` of the states."""
        import coremltools as ct
        import numpy as np

        return [
            ct.StateType(ct.TensorType(shape=shape, dtype=np.float16), name=name)
            for name, shape in self.shapes.items()
        ]


class Split(nn.Module):
    """A float32 tensor as two that float16 can hold."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x -> its first eleven bits, and the rest times `_REMAINDER`; see Veltkamp's splitting."""
        wide = x * _SPLITTER
        high = wide - (wide - x)
        return high, (x - high) * _REMAINDER


class Joined(nn.Module):
    """What `Split` has split."""

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        """Both float16 -> float32."""
        return high.float() + low.float() * (1 / _REMAINDER)


class StateCache:
    """The cache of one forward pass, for tracing; see `decoder.states.Cache`.

    Args:
        module: holds the buffers of a layout.
        layout: of its states.
        config: of the decoder.
        begin: position of the first new token; a number or a traced integer tensor.
        end: position after the last new token.
        visible: positions to return, from 0; None: the whole context.
        count: how many of the new tokens are real, the others follow them; None: all. A traced integer tensor [1].
    """

    def __init__(
        self,
        module: nn.Module,
        layout: StateLayout,
        config: DecoderConfig,
        begin: Any,
        end: Any,
        *,
        visible: Any | None = None,
        count: Tensor | None = None,
    ) -> None:
        self._module, self._places, self._config = module, layout.places, config
        self._begin, self._end, self._visible, self._count = begin, end, visible, count

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [1, kv_heads, new, head_dim] -> those of all visible positions."""
        return self._grown(KEY_CACHE, layer, keys), self._grown(VALUE_CACHE, layer, values)

    def _grown(self, name: str, layer: int, new: Tensor) -> Tensor:
        state = self._module.get_buffer(name)
        index, heads, size = self._places[KeysValues][layer], new.shape[1], new.shape[-1]
        padded = F.pad(new, (0, state.shape[-1] - size)) if state.shape[-1] > size else new
        if state.shape[1] > heads:
            padded = F.pad(padded, (0, 0, 0, 0, 0, state.shape[1] - heads))
        # The layer axis is sliced, not indexed: it takes the place of the batch.
        state[index : index + 1, :, self._begin : self._end, :] = padded.to(state.dtype)
        return state[index : index + 1, :heads, : self._visible, :size].to(new.dtype)

    def extend(self, layer: int, columns: Tensor) -> Tensor:
        """Columns [1, channels, new] -> those kept before and the new ones, [1, channels, width + new]."""
        index, (kept, _) = self._places[Columns][layer], self._sizes(layer, Columns)
        width = self._config.kernel_size
        before = self._read(COLUMN_CACHE, index, kept, width)
        both = torch.cat((before.to(columns.dtype), columns), -1)
        if self._count is None:
            last = both[..., -width:]
        else:
            last = both.index_select(-1, torch.arange(width, dtype=torch.int32) + self._count)
        self._write(COLUMN_CACHE, index, last)
        return both

    def matrices(self, layer: int) -> Tensor:
        """The recurrence so far, float32 [1, heads, key_dim, value_dim]."""
        index, sizes = self._places[Recurrence][layer], self._sizes(layer, Recurrence)
        high, low = (self._read(name, index, *sizes) for name in (RECURRENCE_CACHE, REMAINDER_CACHE))
        return self._module.joined(high, low)  # type: ignore[operator, no-any-return]

    def keep(self, layer: int, matrices: Tensor) -> None:
        """Store float32 [1, heads, key_dim, value_dim]."""
        index = self._places[Recurrence][layer]
        high, low = self._module.split(matrices)  # type: ignore[operator]
        self._write(RECURRENCE_CACHE, index, high)
        self._write(REMAINDER_CACHE, index, low)

    def _sizes(self, layer: int, kind: type) -> tuple[int, int]:
        """Of the last two axes that are used."""
        (state,) = (each for each in layer_states(self._config, layer) if isinstance(each, kind))
        if isinstance(state, Columns):
            return state.channels, state.width
        assert isinstance(state, Recurrence)
        return state.key_dim, state.value_dim

    def _read(self, name: str, index: int, rows: int, columns: int) -> Tensor:
        return self._module.get_buffer(name)[index : index + 1, ..., :rows, :columns]

    def _write(self, name: str, index: int, new: Tensor) -> None:
        state = self._module.get_buffer(name)
        missing = [full - size for full, size in zip(state.shape[-2:], new.shape[-2:], strict=True)]
        padded = F.pad(new, (0, missing[1], 0, missing[0])) if any(missing) else new
        state[index : index + 1] = padded.to(state.dtype)
