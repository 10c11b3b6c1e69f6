"""Operations of a program: names, operands, results, regions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from converters.coreai.read.bytecode import Bytecode, read_section
from converters.coreai.read.cursor import Cursor
from edkm_export.errors import PackageError

__all__ = ["Block", "Operation", "read_operations"]

_ATTRIBUTES, _RESULTS, _OPERANDS, _SUCCESSORS, _REGIONS, _USES, _PROPERTIES = (1 << bit for bit in range(7))
_DEEPEST = 32


@dataclass
class Operation:
    """One operation.

    Attributes:
        name: without the name of the dialect, such as "primitive.add_v1".
        properties: number in the table of properties; None: it has none.
        operands: values that it takes.
        types: of its results.
        results: values that it defines; the same numbers as those of `Block.definitions`.
        regions: bodies.
    """

    name: str
    properties: int | None = None
    operands: list[int] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    results: list[int] = field(default_factory=list)
    regions: list[list[Block]] = field(default_factory=list)


@dataclass
class Block:
    """A sequence of operations.

    Attributes:
        arguments: types of its arguments.
        operations: in order.
        definitions: {value: the operation that defines it}, of this block.
    """

    arguments: list[int] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    definitions: dict[int, Operation] = field(default_factory=dict)

    def inner(self) -> Iterator[Block]:
        """The block itself and all blocks in it."""
        yield self
        for operation in self.operations:
            for region in operation.regions:
                for block in region:
                    yield from block.inner()


def read_operations(bytecode: Bytecode) -> Block:
    """The outermost block.

    Raises:
        PackageError: the section is damaged.
    """
    cursor = bytecode.cursor(bytecode.operations, "the section of operations")
    block = _Reader(bytecode).block(cursor, _Values(), 0)
    if cursor.left:
        cursor.fail(f"has {cursor.left} bytes too many")
    return block


class _Values:
    """Numbers of the values of an isolated region."""

    def __init__(self) -> None:
        self.next = 0


class _Reader:
    def __init__(self, bytecode: Bytecode) -> None:
        self._bytecode = bytecode

    def block(self, cursor: Cursor, values: _Values, depth: int) -> Block:
        head = cursor.varint()
        block = Block()
        if head & 1:
            block.arguments = self._arguments(cursor)
            values.next += len(block.arguments)
            if cursor.byte():
                cursor.fail("orders the uses of a block's arguments, which no Core AI program needs")
        if head >> 1 > cursor.left:
            cursor.fail(f"is said to hold {head >> 1} operations in {cursor.left} bytes")
        for _ in range(head >> 1):
            operation = self._operation(cursor, values, depth)
            block.operations.append(operation)
            for value in operation.results:
                block.definitions[value] = operation
        return block

    @staticmethod
    def _arguments(cursor: Cursor) -> list[int]:
        types = []
        for _ in range(cursor.count()):
            head = cursor.varint()
            types.append(head >> 1)
            if head & 1:
                cursor.varint()  # a location
        return types

    def _operation(self, cursor: Cursor, values: _Values, depth: int) -> Operation:
        names = self._bytecode.operation_names
        index = cursor.varint()
        if index >= len(names):
            cursor.fail(f"names operation {index} of {len(names)}")
        found = Operation(names[index])
        mask = cursor.byte()
        cursor.varint()  # a location
        if mask & ~(_ATTRIBUTES | _RESULTS | _OPERANDS | _REGIONS | _PROPERTIES):
            cursor.fail(f"has an operation {found.name} of an unknown form, {mask}")
        if mask & _ATTRIBUTES:
            cursor.varint()
        if mask & _PROPERTIES:
            found.properties = cursor.varint()
            if found.properties >= len(self._bytecode.properties):
                cursor.fail(f"names properties {found.properties} of {len(self._bytecode.properties)}")
        if mask & _RESULTS:
            found.types = [cursor.varint() for _ in range(cursor.count())]
        if mask & _OPERANDS:
            found.operands = [cursor.varint() for _ in range(cursor.count())]
        found.results = list(range(values.next, values.next + len(found.types)))
        values.next += len(found.types)
        if mask & _REGIONS:
            self._regions(cursor, found, values, depth)
        return found

    def _regions(self, cursor: Cursor, found: Operation, values: _Values, depth: int) -> None:
        if depth >= _DEEPEST:
            raise PackageError(f"operations of the program are nested more than {_DEEPEST} deep.")
        head = cursor.varint()
        if head >> 1 > cursor.left:
            cursor.fail(f"is said to hold {head >> 1} regions in {cursor.left} bytes")
        for _ in range(head >> 1):
            if head & 1:
                _, inner = read_section(cursor, f"body of {found.name}")
                found.regions.append(self._region(inner, _Values(), depth + 1))
                if inner.left:
                    inner.fail(f"has {inner.left} bytes too many")
            else:
                before = values.next
                found.regions.append(self._region(cursor, values, depth + 1))
                values.next = before  # what a region defines is not seen outside of it

    def _region(self, cursor: Cursor, values: _Values, depth: int) -> list[Block]:
        count = cursor.count()
        if not count:
            return []
        cursor.varint()  # number of values in it
        return [self.block(cursor, values, depth) for _ in range(count)]
