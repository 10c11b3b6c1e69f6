"""The container: metadata, and where each tensor's bytes lie.

Strings and numbers are taken as they are; what they mean is decided elsewhere. Every count and offset of the file
is compared with its size before it is followed, and arrays are read at once: vocabularies hold 260,000 entries.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little endian.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edkm_export.errors import BackendMissingError, InputError, SourceError
from edkm_export.regular_file import open_regular

__all__ = ["GgufFile", "StoredTensor", "part_paths", "quantization"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_MOST_ENTRIES = 1 << 22  # of an array, each of which becomes an object; vocabularies have 260,000 tokens
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


def quantization() -> Any:
    """The `gguf` package's quantization types and how to decode them.

    Raises:
        BackendMissingError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise BackendMissingError("GGUF files need gguf: pip install 'edkm-export[gguf]'") from error
    return gguf


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in a file.

    Attributes:
        name: as the file names it.
        kind: name of its quantization type, such as "F32" or "Q4_K".
        shape: of the values, slowest dimension first, as PyTorch counts.
        path: file that holds it.
        offset: of its first byte in the file.
        row_bytes: bytes of one row of `shape[-1]` values.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    row_bytes: int

    @property
    def rows(self) -> int:
        """Number of rows; a vector is one."""
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    @property
    def numel(self) -> int:
        """Number of values."""
        return self.rows * self.shape[-1]

    def raw(self, first: int, last: int) -> NDArray[np.uint8]:
        """Stored bytes of rows `first` to `last`, the latter excluded: uint8 [last - first, row_bytes]."""
        count = (last - first) * self.row_bytes
        data = np.fromfile(self.path, np.uint8, count, offset=self.offset + first * self.row_bytes)
        if data.size != count:
            raise InputError(f"{self.path}: {self.name}: the file ends inside this tensor.")
        return data.reshape(last - first, self.row_bytes)

    def values(self, first: int, last: int) -> NDArray[np.float32]:
        """Decoded rows `first` to `last`, the latter excluded: float32 [last - first, shape[-1]].

        Raises:
            SourceError: values of this type cannot be decoded.
        """
        gguf = quantization()
        kind = gguf.GGMLQuantizationType[self.kind]
        try:
            decoded = gguf.quants.dequantize(self.raw(first, last), kind)
        except NotImplementedError as error:
            raise SourceError(
                f"{self.path}: {self.name}: values of type {self.kind} cannot be decoded; use a file with another "
                "quantization, or F16."
            ) from error
        found: NDArray[np.float32] = np.asarray(decoded, np.float32).reshape(last - first, self.shape[-1])
        return found


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file, all parts of a split one together.

    Attributes:
        path: the first part.
        metadata: {key: value}, of the first part; numbers of float32 keys are exact.
        tensors: {name: where it lies}, of all parts.
        parts: the files, in order.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    parts: tuple[Path, ...] = field(default=())

    @property
    def is_quantized(self) -> bool:
        """Whether a tensor is held in blocks of integers; llama.cpp then rounds activations, too."""
        return any(tensor.kind not in ("F64", "F32", "F16", "BF16") for tensor in self.tensors.values())

    @classmethod
    def open(cls, path: str | Path) -> GgufFile:
        """Read the header of a file, and of the parts beside it when it is split.

        Raises:
            InputError: a file is missing or damaged, or the parts do not belong together.
            SourceError: a type of tensor that is not known.
            BackendMissingError: gguf is not installed.
        """
        quantization()  # refused before the work, not in the middle of it
        paths = part_paths(path)
        first, tensors = _read_part(paths[0])
        if first.get("split.count", 1) != len(paths):
            raise InputError(
                f"{path}: split.count says {first.get('split.count', 1)} parts, its name says {len(paths)}; give the "
                "files the names that they were made with, such as model-00001-of-00003.gguf."
            )
        for number, other in enumerate(paths[1:], start=1):
            metadata, more = _read_part(other)
            if metadata.get("split.no") != number or metadata.get("split.count") != len(paths):
                raise InputError(
                    f"{other}: says that it is part {metadata.get('split.no')} (from 0) of "
                    f"{metadata.get('split.count')}, expected part {number} of {len(paths)}."
                )
            twice = sorted(tensors.keys() & more.keys())
            if twice:
                raise InputError(f"{other}: {twice[0]}: an earlier part holds this tensor too.")
            tensors.update(more)
        expected = first.get("split.tensors.count", len(tensors))
        if expected != len(tensors):
            raise InputError(
                f"{path}: split.tensors.count says {expected} tensors, but its parts hold {len(tensors)}."
            )
        return cls(paths[0], first, tensors, tuple(paths))


def part_paths(path: str | Path) -> list[Path]:
    """All parts of a split file that lie beside the one that is named, in order; a whole file is its own part.

    Raises:
        InputError: a part is missing.
    """
    path = Path(path)
    found = _PART.fullmatch(path.name)
    if found is None:
        return [path]
    count = int(found["count"])
    paths = [
        path.with_name(f"{found['stem']}-{number:05d}-of-{found['count']}{path.suffix}")
        for number in range(1, count + 1)
    ]
    for part in paths:
        if not part.is_file():
            raise InputError(
                f"{path}: is one of {count} parts; {part.name} is missing beside it. Fetch all parts into one folder."
            )
    return paths or [path]


def _read_part(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    try:
        with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Header(path, content).read()
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read as a GGUF file ({error}).") from error


class _Header:
    """Reads the front of a file, with a position that never leaves it."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.position, self.size = path, content, 0, len(content)

    def damaged(self, why: str) -> InputError:
        return InputError(f"{self.path}: is damaged: {why}. Fetch it again.")

    def read(self) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        if self.content[:4] != _MAGIC:
            raise InputError(f"{self.path}: is not a GGUF file; one begins with the letters GGUF.")
        self.position = 4
        version = self._number("<u4")
        if version not in _VERSIONS:
            swapped = struct.unpack(">I", struct.pack("<I", version))[0] in _VERSIONS
            kind = "big-endian files" if swapped else f"version {version}"
            raise SourceError(f"{self.path}: {kind} cannot be read, versions 2 and 3 in little endian can.")
        tensor_count, key_count = self._number("<u8"), self._number("<u8")
        metadata = dict(self._pairs(key_count))
        entries = list(self._entries(tensor_count))
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.damaged(f"general.alignment is {alignment!r}, expected a power of two")
        data = -(-self.position // alignment) * alignment
        tensors: dict[str, StoredTensor] = {}
        for name, shape, number, offset in entries:
            if name in tensors:
                raise self.damaged(f"tensor {name} is there twice")
            if offset % alignment:
                raise self.damaged(f"tensor {name} does not begin at a multiple of {alignment}")
            tensors[name] = self._place(name, shape, number, data + offset)
        return metadata, tensors

    def _place(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> StoredTensor:
        gguf = quantization()
        try:
            known = gguf.GGMLQuantizationType(kind)
        except ValueError as error:
            raise SourceError(
                f"{self.path}: {name}: quantization type {kind} is not known to the installed gguf package; "
                "pip install --upgrade gguf, or use a file with another quantization."
            ) from error
        block, block_bytes = gguf.GGML_QUANT_SIZES[known]
        if shape[-1] % block:
            raise self.damaged(f"tensor {name}: rows of {shape[-1]} are no whole blocks of {known.name}")
        placed = StoredTensor(name, known.name, shape, self.path, offset, shape[-1] // block * block_bytes)
        if offset + placed.rows * placed.row_bytes > self.size:
            raise self.damaged(f"it ends inside tensor {name}")
        return placed

    def _pairs(self, count: int) -> Iterator[tuple[str, Any]]:
        seen = set()
        for _ in range(count):
            key = self._string()
            if key in seen:
                raise self.damaged(f"key {key} is there twice")
            seen.add(key)
            yield key, self._value(self._number("<u4"))

    def _entries(self, count: int) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
        for _ in range(count):
            name, dimensions = self._string(), self._number("<u4")
            if not 1 <= dimensions <= _MAX_DIMENSIONS:
                raise self.damaged(f"tensor {name} has {dimensions} dimensions")
            shape = tuple(int(size) for size in self._numbers("<u8", dimensions))[::-1]
            if not 0 < int(np.prod(np.array(shape, np.float64))) <= self.size * 64:
                raise self.damaged(f"tensor {name} has the shape {list(shape)}")
            yield name, shape, self._number("<u4"), self._number("<u8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._number("<u4"), self._number("<u8")
            if count > _MOST_ENTRIES:
                raise self.damaged(f"an array of {count} values; more than {_MOST_ENTRIES} are not read")
            if inner == _STRING:
                self._require(count * 8)
                return [self._string() for _ in range(count)]
            if inner not in _SCALARS:
                raise self.damaged(f"an array of values of type {inner}")
            values = self._numbers(_SCALARS[inner], count)
            return (values != 0).tolist() if inner == _BOOL else values.tolist()
        if kind not in _SCALARS:
            raise self.damaged(f"a value of type {kind}")
        value = self._numbers(_SCALARS[kind], 1)[0].item()
        return bool(value) if kind == _BOOL else value

    def _string(self) -> str:
        length = self._number("<u8")
        self._require(length)
        start, self.position = self.position, self.position + length
        try:
            return self.content[start : self.position].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged("a text that is not UTF-8") from error

    def _number(self, kind: str) -> int:
        size = int(kind[2])
        self._require(size)
        start, self.position = self.position, self.position + size
        return int.from_bytes(self.content[start : self.position], "little")

    def _numbers(self, kind: str, count: int) -> NDArray[Any]:
        size = count * int(kind[2])
        self._require(size)
        start, self.position = self.position, self.position + size
        return np.frombuffer(self.content[start : self.position], kind)

    def _require(self, size: int) -> None:
        if size > self.size - self.position:
            raise self.damaged("it ends inside its header")
