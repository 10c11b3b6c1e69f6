"""External data: the files beside model.onnx that hold its tensors.

A TensorProto with `data_location = EXTERNAL` names a file, an offset and a length (onnx.proto, `external_data`).
Such a model can come from anywhere, so that a file is only read when it lies beside the model under a plain name,
is no link, and holds the whole range.
"""

from __future__ import annotations

import itertools
import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from edkm_export.errors import PackageError

__all__ = ["ExternalData", "Location", "open_regular"]

_DIGITS = 18  # of an offset or length; fits an int64


@dataclass(frozen=True)
class Location:
    """A range of an external file.

    Attributes:
        file_name: of a file beside the model.
        offset: of its first byte.
        size_bytes: number of bytes; None: what the tensor needs.
    """

    file_name: str
    offset: int
    size_bytes: int | None

    @classmethod
    def parse(cls, entries: list[tuple[object, object]], where: str) -> Location:
        """Read the key-value pairs of `external_data`.

        Args:
            entries: the pairs.
            where: file and tensor, for messages.

        Raises:
            PackageError: a key is unknown, missing or doubled, the name is not a plain file name, or a number is none.
        """
        values: dict[str, str] = {}
        for key, value in entries:
            if key not in ("location", "offset", "length", "checksum") or not isinstance(value, str):
                raise PackageError(f"{where}: external data has an entry {key!r}: {value!r}; not understood.")
            if key in values:
                raise PackageError(f"{where}: external data names {key} twice.")
            values[str(key)] = value
        name = values.get("location", "")
        if not name or name in (".", "..") or any(character in name for character in "/\\:\0"):
            raise PackageError(
                f"{where}: external data lies in {name!r}; only a plain name of a file beside the model is read."
            )
        size = _number(values["length"], "length", where) if "length" in values else None
        return cls(name, _number(values.get("offset", "0"), "offset", where), size)


def _number(text: str, what: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS):
        raise PackageError(f"{where}: {what} of external data is {text[:40]!r}, expected a number of bytes.")
    return int(text)


def open_regular(path: Path, owner: str) -> tuple[int, int]:
    """Open a file for reading, unless it is a link or no ordinary file.

    Args:
        path: the file.
        owner: what refers to it, for messages.

    Returns:
        File descriptor, to be closed by the caller, and size in bytes.

    Raises:
        PackageError: it is missing, a symbolic or hard link, a folder, a pipe or a device.
    """

    def fail(what: str) -> NoReturn:
        raise PackageError(f"{path}: {what}; {owner} needs it.")

    try:
        if path.is_symlink():
            fail("is a symbolic link, which could lead anywhere; copy the folder with `cp -rL`")
        # The flags close the gap between the look and the opening; a pipe would block without the second.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        fail(f"cannot be read ({getattr(error, 'strerror', None) or error})")
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
        return descriptor, status.st_size
    os.close(descriptor)
    if stat.S_ISREG(status.st_mode):
        fail(
            f"has {status.st_nlink} names (hard links), so that another file could change it; copy the folder"
        )
    fail("is not an ordinary file")


class ExternalData:
    """The external files of one model, each mapped once.

    Args:
        model: path of the model.
    """

    def __init__(self, model: Path) -> None:
        self._model = model
        self._files: dict[str, NDArray[np.uint8]] = {}
        self._ranges: dict[str, dict[tuple[int, int], str]] = {}

    @property
    def size_bytes(self) -> int:
        """Bytes of all files that were opened."""
        return sum(len(content) for content in self._files.values())

    @property
    def used_bytes(self) -> int:
        """Bytes that tensors lie in; a range that several share counts once."""
        return sum(end - start for ranges in self._ranges.values() for start, end in ranges)

    def claim(self, location: Location, size_bytes: int, owner: str) -> NDArray[np.uint8]:
        """The bytes of a tensor.

        Args:
            location: where they are.
            size_bytes: how many its type and shape need.
            owner: the tensor, for messages.

        Returns:
            uint8 [size_bytes], a read-only view of the file.

        Raises:
            PackageError: the file may not be read, or does not hold exactly that many bytes there.
        """
        where = f"{self._model}: {owner}"
        if location.size_bytes is not None and location.size_bytes != size_bytes:
            raise PackageError(
                f"{where}: has {location.size_bytes} bytes in {location.file_name}, but its type and shape need "
                f"{size_bytes}; the model is damaged, export it again."
            )
        content = self._open(location.file_name, owner)
        end = location.offset + size_bytes
        if end > len(content):
            raise PackageError(
                f"{where}: {size_bytes} bytes at offset {location.offset} reach beyond the end of "
                f"{location.file_name} ({len(content)} bytes); a truncated file or a wrong offset, export it again."
            )
        self._ranges[location.file_name].setdefault((location.offset, end), owner)
        return content[location.offset : end]

    def check_overlaps(self) -> None:
        """Refuse ranges that overlap without being equal: one of the two offsets is wrong.

        Raises:
            PackageError: two tensors overlap.
        """
        for name, ranges in self._ranges.items():
            ordered = sorted((span, owner) for span, owner in ranges.items() if span[0] < span[1])
            for (before, first), (after, second) in itertools.pairwise(ordered):
                if after[0] < before[1]:
                    raise PackageError(
                        f"{self._model}: {first} and {second} overlap in {name} (bytes {before[0]} to {before[1]} and "
                        f"{after[0]} to {after[1]}); an offset is wrong, export it again."
                    )

    def _open(self, name: str, owner: str) -> NDArray[np.uint8]:
        if name not in self._files:
            descriptor, size = open_regular(self._model.parent / name, owner)
            try:
                if size:
                    mapped = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
                    self._files[name] = np.frombuffer(mapped, np.uint8)
                else:
                    self._files[name] = np.empty(0, np.uint8)
            except OSError as error:
                raise PackageError(
                    f"{self._model.parent / name}: cannot be read ({error.strerror})."
                ) from error
            finally:
                os.close(descriptor)
            self._ranges[name] = {}
        return self._files[name]
