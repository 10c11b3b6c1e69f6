"""Indices as they are stored in a graph: symbols of several indices, cut into planes that fill whole bytes.

The layout is described in docs/onnx.md. Tables undo it by gathering; no graph shifts bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.onnx.format import INDICES_IN_SYMBOL, TWO_PLANES
from edkm_export.palette import PalettizedTensor

__all__ = ["Layout", "code_planes"]

_ROWS = 4096  # rows of indices that are packed at a time

Array = NDArray[Any]


@dataclass(frozen=True)
class Layout:
    """How indices of one width are stored.

    Attributes:
        n_bits: bits of an index, one of 1, 2, 3, 4, 6, 8.
    """

    n_bits: int

    @property
    def in_symbol(self) -> int:
        """Indices in a symbol."""
        return INDICES_IN_SYMBOL[self.n_bits]

    @property
    def symbols(self) -> int:
        """Different symbols."""
        return 1 << self.n_bits * self.in_symbol

    @property
    def split(self) -> bool:
        """A symbol has 6 bits, and is cut into a plane of 4 and one of 2."""
        return self.n_bits in TWO_PLANES

    def padded(self, columns: int) -> int:
        """Columns of a group, padded to whole bytes."""
        unit = self.in_symbol * (4 if self.split else 1)
        return -(-columns // unit) * unit

    def bytes_of(self, columns: int) -> tuple[int, ...]:
        """Bytes of each plane for the columns of a group: (codes,) or (codes, codes_high)."""
        count = self.padded(columns) // self.in_symbol
        return (count // 2, count // 4) if self.split else (count,)

    def indices_of_symbol(self) -> Array:
        """The indices in each symbol, int32 [symbols, in_symbol]."""
        return _fields(np.arange(self.symbols), self.n_bits, self.in_symbol).astype(np.int32)


def _fields(values: Array, bits: int, count: int) -> Array:
    """Cut values into fields, least significant first: [n] -> [n, count]."""
    fields: Array = values[:, None] >> (np.arange(count) * bits) & ((1 << bits) - 1)
    return fields


def low_table() -> Array:
    """The low bits of two symbols in each byte of `codes`, uint8 [256, 2]."""
    return _fields(np.arange(256), 4, 2).astype(np.uint8)


def high_table() -> Array:
    """The high bits of four symbols in each byte of `codes_high`, in their place, uint8 [256, 2, 2]."""
    return (_fields(np.arange(256), 2, 4) << 4).astype(np.uint8).reshape(256, 2, 2)


def code_planes(tensor: PalettizedTensor) -> tuple[Array, ...]:
    """Planes of a weight.

    Returns:
        `codes` and, with 3 and 6 bits, `codes_high`: uint8 [out / dim, groups_in, bytes].
    """
    layout, groups_in = Layout(tensor.n_bits), tensor.groups[1]
    rows, columns = tensor.index_shape
    columns //= groups_in
    sizes = layout.bytes_of(columns)
    if not layout.split and layout.padded(columns) == columns:  # the bit stream of the palette itself
        return (tensor.indices.numpy().reshape(rows, groups_in, sizes[0]),)
    indices = tensor.unpack_indices().numpy().reshape(rows, groups_in, columns)
    planes = tuple(np.empty((rows, groups_in, size), np.uint8) for size in sizes)
    padding = ((0, 0), (0, 0), (0, layout.padded(columns) - columns))
    for start in range(0, rows, _ROWS):
        block = np.pad(indices[start : start + _ROWS], padding)
        symbols = _join(block, layout.n_bits, layout.in_symbol)
        if layout.split:
            planes[0][start : start + _ROWS] = _join(symbols & 15, 4, 2)
            planes[1][start : start + _ROWS] = _join(symbols >> 4, 2, 4)
        else:
            planes[0][start : start + _ROWS] = symbols
    return planes


def _join(values: Array, bits: int, count: int) -> Array:
    """Join fields, least significant first: uint8 [..., n * count] -> [..., n]."""
    fields = values.reshape(*values.shape[:-1], -1, count)
    joined = fields[..., 0].copy()
    for place in range(1, count):
        joined |= fields[..., place] << np.uint8(bits * place)
    return joined
