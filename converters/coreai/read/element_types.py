"""Types of values: tensors, handles of states, functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from converters.coreai.read.bytecode import Bytecode
from edkm_export.errors import PackageError

__all__ = ["ELEMENT_BITS", "Described", "FunctionType", "Handle", "Other", "TensorType", "TypeTable"]

# Found by writing a program for each with Apple's package, see the module's test.
_ELEMENTS = {
    4: "bool",
    5: "float64",
    6: "float32",
    7: "float16",
    8: "bfloat16",
    17: "int64",
    18: "int32",
    19: "int16",
    20: "int8",
    23: "uint64",
    24: "uint32",
    25: "uint16",
    26: "uint8",
    27: "uint4",
    28: "uint2",
    29: "uint1",
    36: "uint6",
    37: "uint3",
}
_TENSOR, _FUNCTION, _HANDLE = 2, 30, 31
_DEEPEST = 8
_MOST_AXES = 16
_LARGEST = 1 << 40  # elements

ELEMENT_BITS = {
    "bool": 8,
    **{name: int("".join(filter(str.isdigit, name))) for name in _ELEMENTS.values() if name != "bool"},
}
"""Bits of an element in a constant."""


@dataclass(frozen=True)
class TensorType:
    """A tensor; None: a size that is not fixed."""

    element: str
    shape: tuple[int | None, ...]

    @property
    def numel(self) -> int | None:
        """Number of elements; None when it is not fixed."""
        sizes = [size for size in self.shape if size is not None]
        return math.prod(sizes) if len(sizes) == len(self.shape) else None

    def __str__(self) -> str:
        return f"{self.element} [{', '.join('?' if size is None else str(size) for size in self.shape)}]"


@dataclass(frozen=True)
class Handle:
    """A state."""

    inner: TensorType


@dataclass(frozen=True)
class FunctionType:
    """What a function takes and gives."""

    inputs: tuple[Described, ...]
    results: tuple[Described, ...]


@dataclass(frozen=True)
class Other:
    """A type that we need not understand, such as a token."""

    kind: int


Described: TypeAlias = TensorType | Handle | FunctionType | Other


class TypeTable:
    """The types of a file, read when they are asked for."""

    def __init__(self, bytecode: Bytecode) -> None:
        self._bytecode = bytecode
        self._found: dict[int, Described] = {}

    def __getitem__(self, index: int) -> Described:
        return self._read(index, 0)

    def tensor(self, index: int) -> TensorType:
        """A type that must be a tensor."""
        found = self[index]
        if not isinstance(found, TensorType):
            raise PackageError(f"type {index} is no tensor.")
        return found

    def _read(self, index: int, depth: int) -> Described:
        if index in self._found:
            return self._found[index]
        if not 0 <= index < len(self._bytecode.types):
            raise PackageError(f"type {index} is named, of {len(self._bytecode.types)}.")
        if depth > _DEEPEST:
            raise PackageError(f"type {index} is made of itself.")
        cursor = self._bytecode.cursor(self._bytecode.types[index], f"type {index}")
        kind = cursor.varint()
        found: Described
        if kind == _TENSOR:
            shape = tuple(self._size(cursor.signed(), index) for _ in range(cursor.count()))
            element = self._element(cursor.varint(), index)
            if len(shape) > _MOST_AXES or math.prod(size or 1 for size in shape) > _LARGEST:
                raise PackageError(f"type {index} is a tensor of shape {list(shape)[:20]}.")
            found = TensorType(element, shape)
        elif kind == _HANDLE:
            inner = self._read(cursor.varint(), depth + 1)
            if not isinstance(inner, TensorType):
                raise PackageError(f"type {index} is a state that is no tensor.")
            found = Handle(inner)
        elif kind == _FUNCTION:
            results = tuple(self._read(cursor.varint(), depth + 1) for _ in range(cursor.count()))
            inputs = tuple(self._read(cursor.varint(), depth + 1) for _ in range(cursor.count()))
            found = FunctionType(inputs, results)
        else:
            found = Other(kind)
        self._found[index] = found
        return found

    @staticmethod
    def _size(value: int, index: int) -> int | None:
        if value == -(1 << 63):
            return None
        if not 0 <= value <= _LARGEST:
            raise PackageError(f"type {index} has an axis of {value}.")
        return value

    def _element(self, index: int, tensor: int) -> str:
        if not 0 <= index < len(self._bytecode.types):
            raise PackageError(f"type {tensor} names type {index}, of {len(self._bytecode.types)}.")
        kind = self._bytecode.cursor(self._bytecode.types[index], f"type {index}").varint()
        if kind not in _ELEMENTS:
            raise PackageError(f"type {tensor} holds elements of an unknown kind, {kind}.")
        return _ELEMENTS[kind]
