"""Types and constants of an ML program, as in MIL.proto."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edkm_export.errors import PackageError, PaletteError, UnsupportedOpError
from edkm_export.packing import unpack

__all__ = [
    "DTYPES",
    "STRING",
    "BlobReference",
    "DType",
    "Inline",
    "TensorType",
    "Value",
    "decode_bytes",
    "read_type",
    "read_value",
]


@dataclass(frozen=True)
class DType:
    """An element type of MIL.

    Attributes:
        name: as in numpy, and uint1 to uint6.
        bits: bits of a stored value; 0 for strings.
        stored: dtype of a tensor that holds the values as they are stored.
        compute: dtype in which the interpreter holds the values (the precision decides on floating point).
        blob_code: its number in weight.bin, None where a blob file cannot hold it.
    """

    name: str
    bits: int
    stored: torch.dtype
    compute: torch.dtype
    blob_code: int | None

    @property
    def is_float(self) -> bool:
        """True for floating point."""
        return self.stored.is_floating_point


_MAX_SIZE = (1 << 31) - 1  # beside a size of zero, which makes their product harmless
_MAX_RANK = 16

STRING = DType("string", 0, torch.uint8, torch.uint8, None)

# MIL.proto DataType -> DType. torch has few operations on uint16 and uint32, hence the wider compute dtypes.
DTYPES: dict[int, DType] = {
    1: DType("bool", 8, torch.bool, torch.bool, None),
    2: STRING,
    10: DType("float16", 16, torch.float16, torch.float16, 1),
    11: DType("float32", 32, torch.float32, torch.float32, 2),
    12: DType("float64", 64, torch.float64, torch.float64, None),
    13: DType("bfloat16", 16, torch.bfloat16, torch.bfloat16, 5),
    21: DType("int8", 8, torch.int8, torch.int8, 4),
    22: DType("int16", 16, torch.int16, torch.int16, 6),
    23: DType("int32", 32, torch.int32, torch.int32, 14),
    24: DType("int64", 64, torch.int64, torch.int64, None),
    25: DType("int4", 4, torch.int8, torch.int8, 8),
    31: DType("uint8", 8, torch.uint8, torch.uint8, 3),
    32: DType("uint16", 16, torch.uint16, torch.int32, 7),
    33: DType("uint32", 32, torch.uint32, torch.int64, 15),
    35: DType("uint4", 4, torch.uint8, torch.uint8, 11),
    36: DType("uint2", 2, torch.uint8, torch.uint8, 10),
    37: DType("uint1", 1, torch.uint8, torch.uint8, 9),
    38: DType("uint6", 6, torch.uint8, torch.uint8, 13),
    39: DType("uint3", 3, torch.uint8, torch.uint8, 12),
}


@dataclass(frozen=True)
class TensorType:
    """Element type and shape that a program declares.

    Attributes:
        dtype: element type.
        shape: sizes, None where flexible; None as a whole when the rank is open too.
        kind: "tensor", "list" (of tensors with these elements) or "dictionary" (with these values).
    """

    dtype: DType
    shape: tuple[int | None, ...] | None
    kind: str = "tensor"

    @property
    def numel(self) -> int | None:
        """Number of elements, None when flexible."""
        sizes = self.fixed_shape
        return None if sizes is None else math.prod(sizes)

    @property
    def fixed_shape(self) -> tuple[int, ...] | None:
        """The shape, None when any part of it is flexible."""
        if self.shape is None:
            return None
        sizes = tuple(size for size in self.shape if size is not None)
        return sizes if len(sizes) == len(self.shape) else None

    def __str__(self) -> str:
        if self.kind != "tensor":
            return f"{self.kind} of {self.dtype.name}"
        if self.shape is None:
            return f"{self.dtype.name} [...]"
        return f"{self.dtype.name} [{', '.join('?' if size is None else str(size) for size in self.shape)}]"


@dataclass(frozen=True)
class BlobReference:
    """Where a constant lies: the file as the program names it, and the offset of its record."""

    file_name: str
    offset: int


Inline: TypeAlias = Tensor | str | tuple[str, ...] | tuple[int, ...]
"""A constant that is written into the program."""


@dataclass(frozen=True, eq=False)
class Value:
    """A constant of the program.

    Attributes:
        type: declared element type and shape.
        inline: the tensor as stored, a string, or a list of strings or integers; None when it lies in a blob file.
        blob: where it lies otherwise.
    """

    type: TensorType
    inline: Inline | None
    blob: BlobReference | None = None


def decode_bytes(data: NDArray[np.uint8], dtype: DType, shape: tuple[int, ...], owner: str) -> Tensor:
    """Make a tensor of stored bytes.

    Args:
        data: uint8 [ceil(numel * bits / 8)], writable, not shared.
        dtype: element type.
        shape: sizes; their product fits the length of `data` (an invariant of the callers).
        owner: for messages.

    Returns:
        A tensor of `dtype.stored`.

    Raises:
        PackageError: padding bits are set.
    """
    count = math.prod(shape)
    assert data.size == (count * dtype.bits + 7) // 8
    stream = torch.from_numpy(data)
    if dtype.bits >= 8:
        return stream.view(dtype.stored).reshape(shape) if count else torch.empty(shape, dtype=dtype.stored)
    try:
        values = unpack(stream, dtype.bits, count).reshape(shape)
    except PaletteError as error:
        raise PackageError(f"{owner}: {error}") from error
    if dtype.stored == torch.int8:
        sign = 1 << (dtype.bits - 1)
        return (values ^ sign).to(torch.int8) - sign  # two's complement below a byte
    return values


def read_type(message: Any, owner: str) -> TensorType:
    """Read a MIL `ValueType` that holds a tensor, a list or a dictionary.

    Raises:
        UnsupportedOpError: it holds something else, or an element type that is not known.
    """
    kind = message.WhichOneof("type")
    if kind == "listType":
        return TensorType(read_type(message.listType.type, owner).dtype, None, "list")
    if kind == "dictionaryType":
        return TensorType(read_type(message.dictionaryType.valueType, owner).dtype, None, "dictionary")
    if kind != "tensorType":
        raise UnsupportedOpError(f"{owner}: type {kind} is not supported, only tensors are.")
    tensor = message.tensorType
    dtype = DTYPES.get(tensor.dataType)
    if dtype is None:
        raise UnsupportedOpError(f"{owner}: element type {tensor.dataType} of MIL is not supported.")
    if any(axis.WhichOneof("dimension") == "unknown" and axis.unknown.variadic for axis in tensor.dimensions):
        return TensorType(dtype, None)
    shape = tuple(
        int(axis.constant.size) if axis.WhichOneof("dimension") == "constant" else None
        for axis in tensor.dimensions
    )
    # what has elements is held against its data, or against what the package bears out
    largest = max((size for size in shape if size is not None), default=0)
    if len(shape) > _MAX_RANK or (0 in shape and largest > _MAX_SIZE):
        what = f"{len(shape)} axes" if len(shape) > _MAX_RANK else f"a size of {largest}"
        raise PackageError(f"{owner}: declared with {what}; no device can hold that.")
    return TensorType(dtype, shape)


def read_value(message: Any, owner: str) -> Value:
    """Read a MIL `Value`; inline data is decoded, data in a blob file is left where it is.

    Raises:
        PackageError: the data does not fit the declared type.
        UnsupportedOpError: a tuple or dictionary, or a list of anything but strings and integers.
    """
    declared = read_type(message.type, owner)
    if message.WhichOneof("value") == "blobFileValue":
        blob = message.blobFileValue
        if declared.fixed_shape is None or declared.dtype.blob_code is None:
            raise PackageError(f"{owner}: a constant in a blob file is declared as {declared}.")
        return Value(declared, None, BlobReference(blob.fileName, blob.offset))
    kind = message.immediateValue.WhichOneof("value")
    if kind == "list":
        items = [read_value(item, owner).inline for item in message.immediateValue.list.values]
        strings = tuple(item for item in items if isinstance(item, str))
        if len(strings) == len(items):
            return Value(declared, strings)
        numbers = tuple(
            int(item)
            for item in items
            if isinstance(item, Tensor) and item.dim() == 0 and not item.is_floating_point()
        )
        if len(numbers) != len(items):
            raise UnsupportedOpError(
                f"{owner}: a list of {declared.dtype.name}, only lists of strings and integers are supported."
            )
        return Value(declared, numbers)
    if kind != "tensor":
        raise UnsupportedOpError(f"{owner}: a constant of kind {kind}, only tensors and lists are supported.")
    return Value(declared, _read_inline(message.immediateValue.tensor, declared, owner))


def _read_inline(message: Any, declared: TensorType, owner: str) -> Inline:
    field = message.WhichOneof("value")
    shape = declared.fixed_shape
    if shape is None or field is None:
        raise PackageError(f"{owner}: an inline constant of {declared} without data of that shape.")
    values = getattr(message, field).values
    count = math.prod(shape)
    dtype = declared.dtype
    expected = (count * dtype.bits + 7) // 8 if field == "bytes" else count
    if len(values) != expected:
        unit = "bytes" if field == "bytes" else "values"
        raise PackageError(f"{owner}: {len(values)} {unit} inline, but {declared} takes {expected}.")
    if (field == "strings") != (dtype is STRING):
        raise PackageError(f"{owner}: an inline constant of {declared} holds {field}.")
    if field == "strings":
        return tuple(values) if shape else str(values[0])
    if field == "bytes":
        return decode_bytes(np.frombuffer(values, np.uint8).copy(), dtype, shape, owner)
    if dtype.is_float != (field in ("floats", "doubles")):
        raise PackageError(f"{owner}: an inline constant of {declared} holds {field}.")
    kind = np.float64 if dtype.is_float else np.int64
    wide = torch.from_numpy(np.fromiter(values, kind, len(values))).reshape(shape)
    narrow = wide.to(dtype.stored)
    if not dtype.is_float and not torch.equal(narrow.to(torch.int64), wide):
        raise PackageError(f"{owner}: an inline constant of {declared} holds a value beyond its type.")
    return narrow
