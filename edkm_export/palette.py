"""PalettizedTensor: the one currency between training, converters and verifier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from edkm_export.errors import PaletteError
from edkm_export.lut_dtypes import LUT_DTYPES, LutDtype, stored_as
from edkm_export.lut_grid import int8_scale
from edkm_export.packing import SUPPORTED_BITS, pack, packed_size_bytes, unpack
from edkm_export.quantities import bit_range

__all__ = ["PalettizedTensor", "all_finite", "check_grouping", "int8_scale"]

_DECODE_ROWS = 1024  # index rows decoded at a time, to bound the int64 temporaries of the gather


def all_finite(tensor: Tensor) -> bool:
    """True when a tensor holds neither NaN nor infinity; needs no copy of it."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def check_grouping(name: str, rows: int, group_size: int, what: str = "output rows") -> None:
    """Refuse a group size that does not divide the rows, naming those that do.

    Raises:
        PaletteError: `group_size` (0 means one group) does not divide `rows`.
    """
    if group_size < 0:
        raise PaletteError(
            f"{name}: group_size {group_size} is negative; use 0 for one group or a divisor of {rows}."
        )
    if group_size and rows % group_size:
        near = [size for size in (4, 8, 16, 32, 64, 128) if rows % size == 0]
        advice = f"use {_or(near)}" if near else "use 0 (one LUT for the whole weight)"
        raise PaletteError(f"{name}: group_size {group_size} does not divide its {rows} {what}; {advice}.")


def _or(sizes: Sequence[int]) -> str:
    words = [str(size) for size in sizes]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


@dataclass(frozen=True, eq=False)
class PalettizedTensor:
    """One weight as lookup tables and indices.

    A weight of shape `[out, in]` (rank above 2: `[out, in * kernel]`) is cut into G_out x G_in blocks, each
    with a LUT of its own. With `dim` above 1 an index selects a vector of `dim` values that run along the
    output axis, so that there are `out / dim` rows of indices.

    Attributes:
        name: parameter name, as in the state dict of the Hugging Face model.
        shape: shape of the dense weight, (out, in, *kernel). GPT-2's Conv1D is held transposed, as a Linear's.
        n_bits: bits of an index, one of 1, 2, 3, 4, 6, 8.
        lut: float16 or int8 [G_out, G_in, 2**n_bits, dim].
        indices: uint8 [ceil(out / dim * in * n_bits / 8)], a bit stream of the row-major indices (see `packing`).
        lut_scale: float16 [G_out, G_in], with an int8 or int4 LUT only: the value of an entry is lut * lut_scale.
        lut_dtype: key of `lut_dtypes.LUT_DTYPES`. An int4 LUT is stored as int8, so that only this tells it apart;
            left out, it is the dtype of `lut`.

    Raises:
        PaletteError: on construction, when the parts do not fit together or hold NaN or infinity.
    """

    name: str
    shape: tuple[int, ...]
    n_bits: int
    lut: Tensor
    indices: Tensor
    lut_scale: Tensor | None = None
    lut_dtype: LutDtype = None  # type: ignore[assignment]  # replaced on construction

    def __repr__(self) -> str:
        """One line: name, shape, bits, LUTs, storage."""
        shape, luts = "x".join(map(str, self.shape)), math.prod(self.groups)
        vectors = f", vectors of {self.dim}" if self.dim > 1 else ""
        return (
            f"PalettizedTensor({self.name}, {shape}, {bit_range([self.n_bits])}, {luts} {self.lut_dtype} "
            f"LUT{'s' if luts > 1 else ''}{vectors}, {self.bits_per_weight:.2f} bits a weight)"
        )

    def __post_init__(self) -> None:
        """Validate; the fields come from files."""
        self._require(
            self.n_bits in SUPPORTED_BITS, f"n_bits is {self.n_bits}, expected one of {SUPPORTED_BITS}"
        )
        self._require(
            len(self.shape) >= 2 and all(isinstance(size, int) and size > 0 for size in self.shape),
            f"shape is {self.shape}, expected at least two positive sizes",
        )
        entries = 1 << self.n_bits
        self._require(
            self.lut.dim() == 4 and self.lut.shape[2] == entries and min(self.lut.shape) > 0,
            f"LUT has shape {list(self.lut.shape)}, expected [groups_out, groups_in, {entries}, dim] at "
            f"{self.n_bits} bits: with fewer entries an index could point beyond the LUT",
        )
        self._check_lut_dtype()
        out, columns = self.matrix_shape
        rows = out // self.dim
        self._require(out % self.dim == 0, f"vectors of {self.dim} do not divide its {out} output rows")
        self._require(
            rows % self.groups[0] == 0, f"{self.groups[0]} groups do not divide its {rows} index rows"
        )
        self._require(
            columns % self.groups[1] == 0, f"{self.groups[1]} groups do not divide its {columns} columns"
        )
        expected = packed_size_bytes(rows * columns, self.n_bits)
        self._require(
            self.indices.dtype == torch.uint8 and self.indices.shape == (expected,),
            f"indices are {self.indices.dtype} {list(self.indices.shape)}, expected uint8 [{expected}] "
            f"for {rows} x {columns} indices of {self.n_bits} bits",
        )
        if not LUT_DTYPES[self.lut_dtype].scaled:
            self._require(self.lut_scale is None, f"a {self.lut_dtype} LUT takes no lut_scale")
            self._require(all_finite(self.lut), "LUT holds NaN or infinity")
        else:
            scale = self.lut_scale
            self._require(scale is not None, f"an {self.lut_dtype} LUT needs a lut_scale")
            assert scale is not None
            self._require(
                scale.dtype == torch.float16 and tuple(scale.shape) == self.groups,
                f"lut_scale is {scale.dtype} {list(scale.shape)}, expected float16 {list(self.groups)}",
            )
            self._require(all_finite(scale), "lut_scale holds NaN or infinity")
            self._require(all_finite(self.lut_values()), "lut * lut_scale overflows float16")

    def _check_lut_dtype(self) -> None:
        """Compare the entries with the table of LUT dtypes; without a name, take the one that they are stored as."""
        told = stored_as(self.lut.dtype)
        self._require(told is not None, f"LUT is {self.lut.dtype}, expected float16 or int8")
        assert told is not None
        given: object = self.lut_dtype
        if given is None:
            object.__setattr__(self, "lut_dtype", told.name)
        else:
            known = isinstance(given, str) and given in LUT_DTYPES
            self._require(known, f"lut_dtype is {given!r}, expected one of {', '.join(LUT_DTYPES)}")
        expected = LUT_DTYPES[self.lut_dtype]
        self._require(
            self.lut.dtype == expected.storage,
            f"LUT is {self.lut.dtype}, but an {self.lut_dtype} LUT is stored as {expected.storage_name}",
        )
        self._require(
            self.n_bits <= expected.max_bits,
            f"an {self.lut_dtype} LUT takes indices of at most {expected.max_bits} bits, found {self.n_bits}",
        )
        if not expected.holds(self.lut):
            low, high = (int(end) for end in self.lut.aminmax())
            bounds = "{} to {}".format(*expected.valid or ())
            self._require(
                False, f"{self.lut_dtype} LUT holds entries from {low} to {high}, expected {bounds}"
            )

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise PaletteError(f"{self.name}: {message}.")

    @classmethod
    def from_indices(
        cls,
        name: str,
        lut: Tensor,
        indices: Tensor,
        *,
        shape: Sequence[int] | None = None,
        lut_scale: Tensor | None = None,
        lut_dtype: LutDtype | None = None,
    ) -> PalettizedTensor:
        """Build from unpacked indices.

        Args:
            name: parameter name.
            lut: float16 or int8 [G_out, G_in, 2**n_bits, dim].
            indices: uint8 [out / dim, in], or [out / dim, in, *kernel] for a convolution.
            shape: dense shape; by default that of the indices, with `dim` times the rows.
            lut_scale: float16 [G_out, G_in] for an int8 or int4 LUT.
            lut_dtype: "int4" for an int8 `lut` on an int4 grid; None: the dtype of `lut`.

        Raises:
            PaletteError: the parts do not fit together, or an index is beyond the LUT.
        """
        if lut.dim() != 4:
            raise PaletteError(f"{name}: LUT has shape {list(lut.shape)}, expected four axes.")
        n_bits = max(int(lut.shape[2]) - 1, 1).bit_length()
        try:
            packed = pack(indices.contiguous(), n_bits)
        except PaletteError as error:
            raise PaletteError(f"{name}: {error}") from error
        full = (indices.shape[0] * lut.shape[3], *indices.shape[1:]) if shape is None else tuple(shape)
        return cls(
            name=name,
            shape=tuple(int(size) for size in full),
            n_bits=n_bits,
            lut=lut.detach().cpu().contiguous(),
            indices=packed,
            lut_scale=None if lut_scale is None else lut_scale.detach().cpu().contiguous(),
            lut_dtype=lut_dtype,  # type: ignore[arg-type]  # None: see the field
        )

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in * kernel): the weight as a matrix."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def index_shape(self) -> tuple[int, int]:
        """(out / dim, in * kernel): the indices as a matrix."""
        return self.shape[0] // self.dim, self.matrix_shape[1]

    @property
    def dim(self) -> int:
        """Values that one index selects."""
        return int(self.lut.shape[3])

    @property
    def groups(self) -> tuple[int, int]:
        """(G_out, G_in): number of LUTs along each axis."""
        return int(self.lut.shape[0]), int(self.lut.shape[1])

    @property
    def group_size(self) -> int:
        """Output rows that share a LUT."""
        return self.shape[0] // self.groups[0]

    @property
    def numel(self) -> int:
        """Weights of the dense tensor."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of indices, LUTs and LUT scales."""
        scale = 0 if self.lut_scale is None else self.lut_scale.numel() * 2
        return self.indices.numel() + self.lut.numel() * self.lut.element_size() + scale

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage a weight, LUTs included."""
        return self.size_bytes * 8 / self.numel

    def lut_values(self) -> Tensor:
        """The LUT as it decodes, float16 [G_out, G_in, 2**n_bits, dim].

        For an int8 or int4 LUT: the product with its scale, rounded once to float16.
        """
        if self.lut_scale is None:
            return self.lut
        return (self.lut.float() * self.lut_scale.float()[:, :, None, None]).half()

    def unpack_indices(self) -> Tensor:
        """Indices, uint8 [out / dim, in * kernel]."""
        rows, columns = self.index_shape
        return unpack(self.indices, self.n_bits, rows * columns).view(rows, columns)

    def decode(self) -> Tensor:
        """Dense weight, float16 `shape`."""
        rows, columns = self.index_shape
        groups_out, groups_in = self.groups
        indices = self.unpack_indices()
        table = self.lut_values().reshape(-1, self.dim)  # [G_out * G_in * entries, dim]
        column_group = torch.arange(columns) // (columns // groups_in)
        dense = torch.empty(rows, self.dim, columns, dtype=torch.float16)
        for start in range(0, rows, _DECODE_ROWS):
            block = indices[start : start + _DECODE_ROWS].int()
            row_group = torch.arange(start, start + block.shape[0]) // (rows // groups_out)
            group = (row_group[:, None] * groups_in + column_group).int()
            chosen = table.index_select(0, ((group << self.n_bits) + block).view(-1))
            dense[start : start + block.shape[0]] = chosen.view(*block.shape, self.dim).transpose(1, 2)
        return dense.view(self.shape)

    @cached_property
    def used_centroids(self) -> Tensor:
        """How many entries of each LUT are selected at least once, int64 [G_out, G_in]."""
        rows, columns = self.index_shape
        groups_out, groups_in = self.groups
        blocks = self.unpack_indices().view(groups_out, rows // groups_out, groups_in, columns // groups_in)
        used = torch.zeros(groups_out, groups_in, 1 << self.n_bits, dtype=torch.bool)
        for group in range(groups_out):
            for column in range(groups_in):
                counts = torch.bincount(
                    blocks[group, :, column].reshape(-1).int(), minlength=1 << self.n_bits
                )
                used[group, column] = counts > 0
        return used.sum(-1)

    def same_bits(self, other: PalettizedTensor) -> bool:
        """True when LUT, scale, indices and shape are equal bit for bit (-0.0 and 0.0 differ).

        Bits are compared as they are stored. That an int8 LUT lies on an int4 grid is a mark of the checkpoint, which
        no exported format has: what is read back from one equals the int4 LUT that was written.
        """
        scales = (self.lut_scale, other.lut_scale)
        return (
            self.shape == other.shape
            and self.n_bits == other.n_bits
            and self.lut.dtype == other.lut.dtype
            and _equal_bits(self.lut, other.lut)
            and torch.equal(self.indices, other.indices)
            and (scales[0] is None) == (scales[1] is None)
            and (scales[0] is None or scales[1] is None or _equal_bits(scales[0], scales[1]))
        )


def _equal_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
