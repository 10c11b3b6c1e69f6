"""Indices and tables of a palettized weight, as docs/onnx.md stores them.

Indices are taken together to symbols of a whole number of bits, and a symbol of 6 bits is cut into a plane of its low
4 bits and one of its high 2 bits, so that every plane fills its bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from converters.onnx.format import (
    CODES,
    CODES_HIGH,
    INDICES_IN_SYMBOL,
    LUT,
    LUT_SCALE,
    PARTS,
    TWO_PLANES,
    part_name,
)
from edkm_export.errors import PackageError, PaletteError
from edkm_export.palette import PalettizedTensor

__all__ = ["read_palette"]

Array = NDArray[Any]


def read_palette(
    tensors: Mapping[str, Array], name: str, shape: tuple[int, ...], n_bits: int, where: str
) -> PalettizedTensor:
    """Put a weight together again.

    Args:
        tensors: initializers of the graph.
        name: of the parameter.
        shape: of the dense weight; what is stored has room for padding.
        n_bits: of an index.
        where: the model, for messages.

    Raises:
        PackageError: parts are missing, or do not fit together.
    """
    where = f"{where}: {name}"
    parts = {part: tensors.get(part_name(name, part)) for part in PARTS}
    lut, scale = _lut(parts, where)
    rows, columns = shape[0] // lut.shape[3], math.prod(shape[1:])
    groups_in = lut.shape[1]
    if shape[0] % lut.shape[3] or columns % groups_in:
        raise PackageError(f"{where}: LUTs {list(lut.shape)} do not divide a weight of shape {list(shape)}.")
    indices = _indices(parts, rows, groups_in, columns // groups_in, n_bits, where)
    if lut.shape[2] != 1 << n_bits:
        raise PackageError(f"{where}: a LUT has {lut.shape[2]} entries, but its codes have {n_bits} bits.")
    try:
        return PalettizedTensor.from_indices(
            name,
            torch.from_numpy(lut.copy()),
            torch.from_numpy(indices),
            shape=shape,
            lut_scale=None if scale is None else torch.from_numpy(scale.copy()),
        )
    except PaletteError as error:
        raise PackageError(f"{where}: {error}") from error


def _lut(parts: Mapping[str, Array | None], where: str) -> tuple[Array, Array | None]:
    """LUT float16 or int8 [G_out, G_in, entries, dim], and the scale of an int8 one."""
    lut, scale = parts[LUT], parts[LUT_SCALE]
    if lut is None or lut.ndim != 4 or not lut.size:
        raise PackageError(
            f"{where}: has {'no LUT' if lut is None else f'a LUT of shape {list(lut.shape)}'}."
        )
    if lut.dtype == np.uint8:
        if scale is None:
            raise PackageError(f"{where}: an int8 LUT has no scale.")
        return (lut.astype(np.int16) - 128).astype(np.int8), scale
    if lut.dtype != np.float16 or scale is not None:
        raise PackageError(f"{where}: a LUT of {lut.dtype}{' with a scale' if scale is not None else ''}.")
    return lut, None


def _indices(
    parts: Mapping[str, Array | None], rows: int, groups_in: int, columns: int, n_bits: int, where: str
) -> NDArray[np.uint8]:
    """Indices uint8 [rows, groups_in * columns], out of the planes."""
    in_symbol = INDICES_IN_SYMBOL[n_bits]
    multiple = {3: 8, 6: 4}.get(n_bits, in_symbol)
    symbols = -(-columns // multiple) * multiple // in_symbol
    if n_bits in TWO_PLANES:
        low = _plane(parts, CODES, (rows, groups_in, symbols // 2), where)
        high = _plane(parts, CODES_HIGH, (rows, groups_in, symbols // 4), where)
        values = _spread(low, 4) | _spread(high, 2) << np.uint8(4)
    else:
        values = _plane(parts, CODES, (rows, groups_in, symbols), where)
        if parts[CODES_HIGH] is not None:
            raise PackageError(f"{where}: has high codes, which {n_bits} bits do not need.")
    indices = _spread(values, n_bits, in_symbol)
    if indices[:, :, columns:].any():
        raise PackageError(
            f"{where}: an index in the padding is not zero; the model is damaged, export it again."
        )
    return indices[:, :, :columns].copy().reshape(rows, groups_in * columns)


def _plane(
    parts: Mapping[str, Array | None], part: str, shape: tuple[int, ...], where: str
) -> NDArray[np.uint8]:
    codes = parts[part]
    if codes is None or codes.dtype != np.uint8 or codes.shape != shape:
        found = "missing" if codes is None else f"{codes.dtype} {list(codes.shape)}"
        raise PackageError(f"{where}: {part} are {found}, expected uint8 {list(shape)}.")
    return codes


def _spread(values: NDArray[np.uint8], n_bits: int, count: int | None = None) -> NDArray[np.uint8]:
    """Cut each value into fields of `n_bits`, least significant first: [..., n] -> [..., n * count]."""
    if n_bits == 8:
        return values
    shifts = np.arange(0, n_bits * (count or 8 // n_bits), n_bits, dtype=np.uint8)
    fields = values[..., None] >> shifts & np.uint8((1 << n_bits) - 1)
    return fields.reshape(*values.shape[:-1], -1)
