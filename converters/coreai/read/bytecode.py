"""The container of a program: MLIR bytecode, version 6, https://mlir.llvm.org/docs/BytecodeFormat/.

Read with our own code and nothing else, so that what is on disk is seen as it is. Here are the sections and their
tables; what types, attributes and operations mean is read by the modules beside.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from converters.coreai.read.cursor import Cursor
from edkm_export.errors import PackageError

__all__ = ["Bytecode", "Resource", "Span", "read_bytecode"]

MAGIC = b"ML\xefR"
VERSION = 6
DIALECT, DIALECT_VERSION = "aicode", b"\x05"
"""Core AI's own dialect in files, and the version that iOS 27 and macOS 27 write."""

_STRING, _DIALECTS, _ENTRIES, _ENTRY_OFFSETS, _IR, _RESOURCES, _RESOURCE_OFFSETS, _, _PROPERTIES = range(9)
_NAMES = (
    "string section",
    "dialect section",
    "section of attributes and types",
    "offsets of attributes and types",
    "section of operations",
    "resource section",
    "offsets of resources",
    "section of dialect versions",
    "section of properties",
)
_PADDING = 0xCB


@dataclass(frozen=True)
class Span:
    """A stretch of the file; `custom`: in the dialect's own encoding."""

    start: int
    end: int
    custom: bool = True


@dataclass(frozen=True)
class Resource:
    """Bytes that a constant refers to."""

    name: str
    start: int
    size: int


@dataclass
class Bytecode:
    """The tables of a file.

    Attributes:
        data: the file.
        operation_names: without the name of the dialect.
        attributes, types, properties: where each is encoded.
        resources: in their order in the file.
        operations: section of operations.
    """

    data: memoryview
    producer: str = ""
    strings: list[str] = field(default_factory=list)
    operation_names: list[str] = field(default_factory=list)
    attributes: list[Span] = field(default_factory=list)
    types: list[Span] = field(default_factory=list)
    properties: list[Span] = field(default_factory=list)
    resources: list[Resource] = field(default_factory=list)
    operations: Span = Span(0, 0)

    def cursor(self, span: Span, what: str) -> Cursor:
        """To read a stretch."""
        return Cursor(self.data, span.start, span.end, what)

    def string(self, cursor: Cursor, index: int | None = None) -> str:
        """The string whose number comes next."""
        index = cursor.varint() if index is None else index
        if index >= len(self.strings):
            cursor.fail(f"names string {index} of {len(self.strings)}")
        return self.strings[index]


def read_bytecode(data: memoryview) -> Bytecode:
    """Read all tables.

    Raises:
        PackageError: no bytecode, of another version or dialect, or damaged. The message names no file.
    """
    cursor = Cursor(data, 0, None, "the program")
    if bytes(cursor.take(4)) != MAGIC:
        raise PackageError("the program is no MLIR bytecode.")
    version = cursor.varint()
    if version != VERSION:
        raise PackageError(
            f"the program is MLIR bytecode of version {version}, this release reads {VERSION}."
        )
    found = Bytecode(data, producer=cursor.text())
    sections = _sections(cursor)
    _read_strings(found, sections)
    _read_dialects(found, sections)
    _read_entries(found, sections)
    if _RESOURCES in sections or _RESOURCE_OFFSETS in sections:
        _read_resources(found, sections)
    if _PROPERTIES in sections:
        cursor = sections[_PROPERTIES]
        for _ in range(cursor.count()):
            size = cursor.varint()
            start = cursor.position
            cursor.take(size)
            found.properties.append(Span(start, start + size))
        _at_end(cursor)
    cursor = _section(sections, _IR)
    found.operations = Span(cursor.position, cursor.end)
    return found


def read_section(cursor: Cursor, what: str = "") -> tuple[int, Cursor]:
    """A section: its kind, and a cursor over its contents."""
    head = cursor.byte()
    size = cursor.varint()
    if head & 0x80:
        cursor.align(cursor.varint(), _PADDING)
    start, kind = cursor.position, head & 0x7F
    cursor.take(size)
    name = what or (_NAMES[kind] if kind < len(_NAMES) else f"section {kind}")
    return kind, Cursor(cursor.data, start, start + size, f"the {name}")


def _sections(cursor: Cursor) -> dict[int, Cursor]:
    sections: dict[int, Cursor] = {}
    while cursor.left:
        kind, section = read_section(cursor)
        if kind in sections or kind >= len(_NAMES):
            cursor.fail(f"has a second or unknown section {kind}")
        sections[kind] = section
    return sections


def _section(sections: dict[int, Cursor], kind: int) -> Cursor:
    if kind not in sections:
        raise PackageError(f"the program has no {_NAMES[kind]}.")
    return sections[kind]


def _at_end(cursor: Cursor) -> None:
    if cursor.left:
        cursor.fail(f"has {cursor.left} bytes too many")


def _read_strings(found: Bytecode, sections: dict[int, Cursor]) -> None:
    """Sizes come first, in reverse order; each string ends with a zero byte."""
    cursor = _section(sections, _STRING)
    sizes = [cursor.varint() for _ in range(cursor.count())]
    for size in reversed(sizes):
        raw = cursor.take(size)
        if not size or raw[-1]:
            cursor.fail("holds a string without an end")
        found.strings.append(cursor.decode(raw[:-1]))
    _at_end(cursor)


def _read_dialects(found: Bytecode, sections: dict[int, Cursor]) -> None:
    cursor = _section(sections, _DIALECTS)
    names = []
    for _ in range(cursor.count()):
        index = cursor.varint()
        names.append(found.string(cursor, index >> 1))
        version = b""
        if index & 1:
            _, inner = read_section(cursor)
            version = bytes(inner.take(inner.left))
        if names[-1] != DIALECT or version != DIALECT_VERSION:
            raise PackageError(
                f"the program uses dialect {names[-1]!r} of version {version.hex() or 'none'}; this release reads "
                f"{DIALECT} of version {DIALECT_VERSION.hex()}."
            )
    cursor.varint()  # how many names there are in all
    while cursor.left:
        _dialect(cursor, names)
        for _ in range(cursor.count()):
            found.operation_names.append(found.string(cursor, cursor.varint() >> 1))


def _dialect(cursor: Cursor, names: list[str]) -> None:
    index = cursor.varint()
    if index >= len(names):
        cursor.fail(f"names dialect {index} of {len(names)}")


def _read_entries(found: Bytecode, sections: dict[int, Cursor]) -> None:
    """Attributes, then types, each with its size."""
    cursor, entries = _section(sections, _ENTRY_OFFSETS), _section(sections, _ENTRIES)
    attributes, types = cursor.varint(), cursor.varint()
    if attributes + types > entries.left:
        cursor.fail(f"names {attributes} attributes and {types} types in {entries.left} bytes")
    spans: list[Span] = []
    while len(spans) < attributes + types:
        cursor.varint()  # the dialect; there is one
        for _ in range(cursor.count()):
            value = cursor.varint()
            start = entries.position
            entries.take(value >> 1)
            spans.append(Span(start, entries.position, bool(value & 1)))
    if len(spans) != attributes + types:
        cursor.fail("counts its entries wrongly")
    _at_end(cursor)
    _at_end(entries)
    found.attributes, found.types = spans[:attributes], spans[attributes:]


def _read_resources(found: Bytecode, sections: dict[int, Cursor]) -> None:
    cursor, contents = _section(sections, _RESOURCE_OFFSETS), _section(sections, _RESOURCES)
    if cursor.varint():
        cursor.fail("has groups of resources from outside of the dialect")
    while cursor.left:
        cursor.varint()  # the dialect
        for _ in range(cursor.count()):
            name, size, kind = found.string(cursor), cursor.varint(), cursor.byte()
            start = contents.position
            contents.take(size)
            if kind:
                cursor.fail(f"has resource {name} of kind {kind}, which is no blob")
            blob = Cursor(found.data, start, start + size, f"resource {name}")
            alignment, held = blob.varint(), blob.varint()
            blob.align(alignment, _PADDING)
            found.resources.append(Resource(name, blob.position, held))
            blob.take(held)
            _at_end(blob)
    _at_end(contents)
