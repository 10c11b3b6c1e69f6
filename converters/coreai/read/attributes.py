"""Attributes that we need: strings, types, lists, names, contents of constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from converters.coreai.read.bytecode import Bytecode, Resource
from converters.coreai.read.operations import Operation
from edkm_export.errors import PackageError

__all__ = ["AttributeTable", "Contents", "Named", "TypeIndex"]

_STRING, _INTEGER, _TYPE, _LIST, _INLINE, _RESOURCE, _NAMED = 1, 2, 4, 5, 6, 7, 9
_DEEPEST = 8


@dataclass(frozen=True)
class TypeIndex:
    """Number of a type."""

    index: int


@dataclass(frozen=True)
class Named:
    """An entry of a dictionary."""

    name: str
    value: Attribute


@dataclass(frozen=True)
class Contents:
    """Of a constant.

    Attributes:
        raw: the bytes, not copied.
        splat: they are one element that stands for all.
    """

    raw: memoryview
    splat: bool


Attribute: TypeAlias = "str | int | TypeIndex | Named | Contents | tuple[Attribute, ...] | None"
"""None: of a kind that we need not understand."""


class AttributeTable:
    """The attributes of a file, read when they are asked for."""

    def __init__(self, bytecode: Bytecode) -> None:
        self._bytecode = bytecode
        self._found: dict[int, Attribute] = {}  # lists of lists would else be read again and again

    def __getitem__(self, index: int) -> Attribute:
        return self._read(index, 0)

    def contents_size_bytes(self) -> int:
        """Bytes of the contents of all constants."""
        size = 0
        for index, span in enumerate(self._bytecode.attributes):
            if self._bytecode.cursor(span, f"attribute {index}").varint() in (_INLINE, _RESOURCE):
                found = self[index]
                assert isinstance(found, Contents)
                size += len(found.raw)
        return size

    def properties(self, operation: Operation) -> list[int]:
        """Numbers of the attributes in the properties of an operation, as far as they are attributes."""
        if operation.properties is None:
            return []
        span = self._bytecode.properties[operation.properties]
        cursor = self._bytecode.cursor(span, f"properties of {operation.name}")
        found = []
        while cursor.left:
            found.append(cursor.varint())
        return found

    def _read(self, index: int, depth: int) -> Attribute:
        if index not in self._found:
            self._found[index] = self._parse(index, depth)
        return self._found[index]

    def _parse(self, index: int, depth: int) -> Attribute:
        table = self._bytecode.attributes
        if not 0 <= index < len(table):
            raise PackageError(f"attribute {index} is named, of {len(table)}.")
        if depth > _DEEPEST:
            raise PackageError(f"attribute {index} is made of itself.")
        cursor = self._bytecode.cursor(table[index], f"attribute {index}")
        kind = cursor.varint()
        if kind == _STRING:
            return self._bytecode.string(cursor)
        if kind == _INTEGER:
            bits = cursor.varint()
            cursor.varint()  # whether it is signed
            return cursor.byte() if bits <= 8 else cursor.signed()
        if kind == _TYPE:
            return TypeIndex(cursor.varint())
        if kind == _LIST:
            return tuple(self._read(cursor.varint(), depth + 1) for _ in range(cursor.count()))
        if kind == _NAMED:
            name = self._bytecode.string(cursor)
            # Other forms hold declarations of composed operations, which we need not understand.
            plain = cursor.varint() == 1
            return Named(name, self._read(cursor.varint(), depth + 1) if plain else None)
        if kind == _INLINE:
            splat = cursor.byte()
            if splat > 1:
                cursor.fail(f"has contents of an unknown form, {splat}")
            contents = Contents(cursor.take(cursor.varint()), bool(splat))
            if cursor.left:
                cursor.fail(f"has {cursor.left} bytes too many")
            return contents
        if kind == _RESOURCE:
            found = self._resource(cursor.varint())
            return Contents(self._bytecode.data[found.start : found.start + found.size], False)
        return None

    def _resource(self, index: int) -> Resource:
        if index >= len(self._bytecode.resources):
            raise PackageError(f"resource {index} is named, of {len(self._bytecode.resources)}.")
        return self._bytecode.resources[index]
