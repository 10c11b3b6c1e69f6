"""Palettes of a program, as PalettizedTensors again, and its other weights.

The format keeps no names of weights. Ours are in the metadata of the asset, each with a digest of what is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from converters.coreai.format import dense_digest, palette_digest
from converters.coreai.read.description import DenseEntry, Description
from converters.coreai.read.element_types import TensorType
from converters.coreai.read.program import Constant, Function, Program
from edkm_export.errors import PackageError, PaletteError
from edkm_export.packing import pack, unpack
from edkm_export.palette import PalettizedTensor

__all__ = ["StoredPalette", "read_dense", "read_palettes", "stored_palettes"]

_LUT_TO_DENSE, _SCALED = "primitive.lut_to_dense_v1", "primitive.blockwise_shift_scale_v2"
_MOST_TRIVIAL = 1 << 20  # elements of a norm or bias; a matrix of ones is none
_INDICES = {f"uint{bits}": bits for bits in (1, 2, 3, 4, 6, 8)}


@dataclass(frozen=True)
class StoredPalette:
    """A palette as a program holds it.

    Attributes:
        n_bits: of an index.
        index_shape: (out / dim, in).
        indices: packed, least significant bit first.
        lut: float16 or int8 [G_out, G_in, 2**n_bits, dim].
        scale: float16 [G_out, G_in], for an int8 LUT.
    """

    n_bits: int
    index_shape: tuple[int, int]
    indices: bytes
    lut: NDArray[Any]
    scale: NDArray[Any] | None

    @cached_property
    def digest(self) -> str:
        """Of everything."""
        return palette_digest(self.n_bits, self.index_shape, self.indices, self.lut, self.scale)

    @property
    def dense_shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.index_shape[0] * int(self.lut.shape[3]), self.index_shape[1]

    def tensor(self, name: str, shape: tuple[int, ...], n_bits: int) -> PalettizedTensor:
        """As a palettized tensor.

        Args:
            name: of the parameter.
            shape: of the dense weight.
            n_bits: 3 for indices that are held in 4 bits; otherwise as it is stored.

        Raises:
            PackageError: the parts do not fit together.
        """
        indices = torch.frombuffer(bytearray(self.indices), dtype=torch.uint8)
        lut = torch.from_numpy(self.lut.copy())
        scale = None if self.scale is None else torch.from_numpy(self.scale.copy())
        try:
            if (self.n_bits, n_bits) == (4, 3):
                indices = pack(unpack(indices, 4, self.index_shape[0] * self.index_shape[1]), 3)
                if lut[:, :, 8:].any():
                    raise PackageError(f"{name}: entries of its LUT that no index selects are not zero.")
                lut = lut[:, :, :8].contiguous()
            elif self.n_bits != n_bits:
                raise PackageError(f"{name}: has indices of {self.n_bits} bits, its metadata says {n_bits}.")
            found = PalettizedTensor(name, shape, n_bits, lut, indices, scale)
            found.unpack_indices()  # refuses padding bits that are set
        except PaletteError as error:
            raise PackageError(str(error)) from error
        if found.index_shape != self.index_shape:
            raise PackageError(
                f"{name}: has indices of shape {list(self.index_shape)}, a weight of shape {list(shape)} has "
                f"{list(found.index_shape)}."
            )
        return found


def stored_palettes(program: Program) -> Iterator[StoredPalette]:
    """Every palette that is decoded somewhere in a program.

    Raises:
        PackageError: one has a form that we do not write.
    """
    read: dict[tuple[tuple[int, TensorType], ...], StoredPalette] = {}  # many functions share a weight
    for function in program.functions.values():
        for block, operation in function.operations(_LUT_TO_DENSE):
            indices = function.constant_operand(block, operation, 0)
            axis = function.constant_operand(block, operation, 2)
            if axis.array().reshape(-1).tolist() != [0]:
                raise PackageError(
                    f"function {function.name}: a palette has its vectors on another axis than 0."
                )
            made = function.operand(block, operation, 1)
            scaling: list[Constant] = []
            if made is not None and made.name == _SCALED:
                lut, *scaling = (function.constant_operand(block, made, place) for place in range(4))
            else:
                lut = function.constant_operand(block, operation, 1)
            key = tuple((id(each.contents), each.type) for each in (indices, lut, *scaling))
            if key not in read:
                scale = _scale(function, lut, scaling) if scaling else None
                read[key] = _palette(function.name, indices, lut, scale)
            yield read[key]


def _palette(function: str, indices: Constant, lut: Constant, scale: NDArray[Any] | None) -> StoredPalette:
    wanted = "int8" if scale is not None else "float16"
    shape = tuple(size or 0 for size in lut.type.shape)
    if indices.type.element not in _INDICES or len(indices.type.shape) != 2 or len(shape) != 4:
        raise PackageError(f"function {function}: a palette has indices {indices.type} and a LUT {lut.type}.")
    rows, columns = (size or 0 for size in indices.type.shape)
    n_bits = _INDICES[indices.type.element]
    fits = all(shape) and not rows % shape[0] and not columns % shape[1]
    if lut.type.element != wanted or shape[2] != 1 << n_bits or not fits or not rows * columns:
        raise PackageError(
            f"function {function}: a palette has indices {indices.type} and a LUT {lut.type}, which do not fit "
            "together."
        )
    return StoredPalette(n_bits, (rows, columns), indices.packed(), lut.array(), scale)


def _scale(function: Function, lut: Constant, operands: list[Constant]) -> NDArray[Any]:
    """The scale of an int8 LUT, float16 [G_out, G_in]; both offsets must be zero."""
    scale, inner, outer = operands
    wanted = (*lut.type.shape[:2], 1, 1)
    kinds = (scale.type.element, inner.type.element, outer.type.element)
    same = all(each.type.shape == wanted for each in operands) and len(lut.type.shape) == 4
    if kinds != ("float16", "int8", "float16") or not same or inner.array().any() or outer.array().any():
        raise PackageError(f"function {function.name}: a LUT is scaled in a form that we do not write.")
    values: NDArray[Any] = scale.array()
    return np.ascontiguousarray(values.reshape(values.shape[:2]))


def read_palettes(program: Program, description: Description) -> dict[str, PalettizedTensor]:
    """Palettized weights by name.

    Raises:
        PackageError: a weight that the metadata names is not there, or one is there that it does not name.
    """
    stored: dict[str, StoredPalette] = {}
    for palette in stored_palettes(program):
        stored.setdefault(palette.digest, palette)
    order = {digest: place for place, digest in enumerate(stored)}  # that of the program, not of the metadata
    found = {}
    for name, told in sorted(
        description.palettized.items(), key=lambda each: order.get(each[1].digest, len(order))
    ):
        if told.digest not in stored:
            raise PackageError(
                f"{name}: nothing in the program has the digest that the metadata gives for it; LUT or indices were "
                "changed, or it was left out."
            )
        found[name] = stored[told.digest].tensor(name, told.shape, told.n_bits)
    unknown = set(stored) - {told.digest for told in description.palettized.values()}
    if unknown:
        shape = list(stored[sorted(unknown)[0]].index_shape)
        raise PackageError(
            f"a palette with indices of shape {shape} is in the program that the metadata does not name."
        )
    return found


def read_dense(program: Program, description: Description) -> dict[str, Tensor]:
    """Other weights by name, float16.

    A weight that the model computes with in float32, such as what decays are made of, is held in float32: a converter
    widens it when it writes the file, which loses nothing. Weights of nothing but ones or zeros may be left out, since
    a converter drops products and sums that change nothing.

    Raises:
        PackageError: any other weight that the metadata names is not there.
    """
    sizes = {told.numel for told in description.dense.values()}
    stored: dict[str, NDArray[Any]] = {}
    for function in program.functions.values():
        for constant in function.constants():
            if constant.type.numel not in sizes:
                continue
            if constant.type.element == "float16":
                stored.setdefault(dense_digest(constant.packed()), constant.array())
            elif constant.type.element == "float32" and (narrow := _narrowed(constant.array())) is not None:
                stored.setdefault(dense_digest(narrow.tobytes()), narrow)
    found = {}
    for name, told in description.dense.items():
        if told.digest in stored:
            found[name] = torch.from_numpy(stored[told.digest].reshape(told.shape).copy())
        elif not _is_trivial(told):
            raise PackageError(
                f"{name}: no constant of the program has the digest that the metadata gives for it; it was changed, or "
                "left out."
            )
    return found


def _narrowed(values: NDArray[Any]) -> NDArray[Any] | None:
    """Float32 values in float16; None where one of them is no number of float16."""
    with np.errstate(over="ignore"):
        narrow = values.astype("<f2")
    return narrow if np.array_equal(narrow.astype(np.float32), values) else None


def _is_trivial(told: DenseEntry) -> bool:
    """Ones or zeros, by their digest."""
    if told.numel > _MOST_TRIVIAL:
        return False
    return any(told.digest == dense_digest(np.full(told.numel, value, "<f2").tobytes()) for value in (0, 1))
