"""The dense weight that a graph must arrive at, rows at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edkm_export.palette import PalettizedTensor

__all__ = ["DenseWeight"]

Array = NDArray[Any]

_ROWS = 1024  # compared at a time


class DenseWeight:
    """A palettized weight as the matrix [out, in] that it stands for.

    Args:
        palette: the weight.
    """

    def __init__(self, palette: PalettizedTensor) -> None:
        self.rows, self.columns = palette.matrix_shape
        self._dim = palette.dim
        self._indices = palette.unpack_indices().numpy()
        self._lut = palette.lut.numpy()
        self._scale = None if palette.lut_scale is None else palette.lut_scale.numpy().astype(np.float32)
        self._values = palette.lut_values().numpy()

    def same(self, found: Array, start: int) -> bool:
        """Compare values bit for bit.

        Args:
            found: float16 or float32 [count, in].
            start: row of the weight that the first one should be.
        """
        if found.ndim != 2 or found.dtype not in (np.float16, np.float32):
            return False
        return self._same_rows(found, self._values, start)

    def same_entries(self, entries: Array, scales: Array, block: int, start: int) -> bool:
        """Compare entries of an int8 LUT and their scales bit for bit.

        Args:
            entries: uint8 [count, in], entry plus 128.
            scales: float16 or float32 [count, blocks].
            block: columns that share a scale.
            start: row of the weight that the first one should be.
        """
        if self._scale is None or entries.dtype != np.uint8:
            return False
        product = self._lut.astype(np.float32) * self._scale[:, :, None, None]
        if not np.array_equal(product, self._values):  # what multiplies them does not round to float16
            return False
        table = (self._lut.astype(np.int16) + 128).astype(np.uint8)
        if not self._same_rows(entries, table, start):
            return False
        rows_out = np.arange(start, start + len(entries)) // (self.rows // len(self._scale))
        first, last = (
            self._column_groups(np.arange(scales.shape[1]) * block),
            self._column_groups(np.minimum((np.arange(scales.shape[1]) + 1) * block, self.columns) - 1),
        )
        expected = self._scale[rows_out][:, first]
        return bool((first == last).all()) and np.array_equal(scales.astype(np.float32), expected)

    def _same_rows(self, found: Array, table: Array, start: int) -> bool:
        if found.shape[1] != self.columns or start + len(found) > self.rows or not len(found):
            return False
        if start % self._dim or len(found) % self._dim:
            return False
        for first in range(0, len(found), _ROWS * self._dim):
            block = found[first : first + _ROWS * self._dim]
            expected = self._gather(table, start + first, len(block)).astype(found.dtype)
            if not np.array_equal(_bits(block), _bits(expected)):
                return False
        return True

    def _gather(self, table: Array, start: int, count: int) -> Array:
        """Rows of the weight with values from `table` [G_out, G_in, entries, dim], in its dtype."""
        groups_out, groups_in, entries, dim = table.shape
        rows = np.arange(start // dim, (start + count) // dim)
        group = rows[:, None] // (len(self._indices) // groups_out) * groups_in
        group = group + self._column_groups(np.arange(self.columns))
        chosen = table.reshape(-1, dim)[group * entries + self._indices[rows]]
        return np.ascontiguousarray(chosen.transpose(0, 2, 1)).reshape(count, self.columns)

    def _column_groups(self, columns: Array) -> Array:
        groups: Array = columns // (self.columns // self._lut.shape[1])
        return groups


def _bits(values: Array) -> Array:
    """The same memory as integers: -0.0 and 0.0 differ."""
    return np.ascontiguousarray(values).view(np.dtype(f"u{values.dtype.itemsize}"))
