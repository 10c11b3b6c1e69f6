"""Reader of weight.bin, the blob file that holds the constants of an ML program.

The file starts with a 64-byte header (`<II`: number of records, version 2; the rest is reserved). A constant
of the program names the offset of a 64-byte record, `<IIQQQ`: sentinel, dtype code, size in bytes, data
offset, padding bits; the rest is reserved. Header, records and data are aligned to 64 bytes. Values below a
byte form one bit stream, least significant bit first; the padding bits are those of its last byte that hold
no value.

The layout and the dtype codes are those of MILBlob's StorageFormat.hpp and BlobDataType.hpp in coremltools.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from edkm_export.errors import PackageError
from edkm_export.regular_file import open_regular

__all__ = ["BlobFile", "BlobRecord"]

_ALIGNMENT = 64
_HEADER = struct.Struct("<II")
_RECORD = struct.Struct("<IIQQQ")
_HEADER_BYTES = 64
_RECORD_BYTES = 64
_VERSION = 2
_SENTINEL = 0xDEADBEEF


@dataclass(frozen=True)
class BlobRecord:
    """What weight.bin says about one constant.

    Attributes:
        dtype_code: see `values.DType.blob_code`.
        size_bytes: length of the data.
        data_offset: position of the data in the file.
        padding_bits: bits of the last byte that hold no value.
    """

    dtype_code: int
    size_bytes: int
    data_offset: int
    padding_bits: int


class BlobFile:
    """A weight.bin, mapped into memory; each read is checked against the length of the file.

    Raises:
        PackageError: on construction, when the file is missing, too short or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_regular(path) as file:
                self.size_bytes = path.stat().st_size
                if self.size_bytes < _HEADER_BYTES:
                    raise PackageError(
                        f"{path}: {self.size_bytes} bytes, shorter than the {_HEADER_BYTES}-byte header; "
                        "the package is truncated, copy or export it again."
                    )
                self._map = mmap.mmap(file.fileno(), self.size_bytes, access=mmap.ACCESS_READ)
        except OSError as error:
            raise PackageError(
                f"{path}: cannot be read ({error.strerror}); the package is incomplete."
            ) from error
        self.count, version = _HEADER.unpack_from(self._map, 0)
        if version != _VERSION:
            raise PackageError(f"{path}: blob file version {version}, expected {_VERSION}.")

    def record(self, offset: int, owner: str) -> BlobRecord:
        """Read and check the record at `offset`.

        Args:
            offset: position of the record, as in the program.
            owner: the tensor or op that refers to it, for messages.

        Raises:
            PackageError: the record, or the data that it points to, is not where a blob file may hold it.
        """

        def fail(what: str) -> NoReturn:
            raise PackageError(f"{self.path}: {owner}: {what}; the package is damaged, export it again.")

        if offset < _HEADER_BYTES:
            fail(f"record offset {offset} is inside the {_HEADER_BYTES}-byte header")
        if offset % _ALIGNMENT:
            fail(f"record offset {offset} is not a multiple of {_ALIGNMENT}")
        if offset + _RECORD_BYTES > self.size_bytes:
            fail(f"record offset {offset} is beyond the end of the file ({self.size_bytes} bytes)")
        sentinel, code, size_bytes, data_offset, padding_bits = _RECORD.unpack_from(self._map, offset)
        if sentinel != _SENTINEL:
            fail(f"no record at offset {offset}: sentinel is 0x{sentinel:08X}, expected 0x{_SENTINEL:08X}")
        if data_offset % _ALIGNMENT:
            fail(f"data offset {data_offset} is not a multiple of {_ALIGNMENT}")
        on_record = data_offset < offset + _RECORD_BYTES and offset < data_offset + size_bytes
        if data_offset < _HEADER_BYTES or on_record:
            fail(f"data offset {data_offset} overlaps the header or its own record at {offset}")
        if data_offset + size_bytes > self.size_bytes:
            fail(
                f"{size_bytes} bytes at data offset {data_offset} reach beyond the end of the file "
                f"({self.size_bytes} bytes)"
            )
        return BlobRecord(code, size_bytes, data_offset, padding_bits)

    def read(self, offset: int, owner: str, *, dtype_code: int, bits: int, count: int) -> NDArray[np.uint8]:
        """Copy the data of the record at `offset`.

        Args:
            offset: position of the record.
            owner: the tensor or op that refers to it, for messages.
            dtype_code: dtype that the program declares.
            bits: bits of one value.
            count: number of values that the program declares.

        Returns:
            uint8 [ceil(count * bits / 8)], the bytes as stored.

        Raises:
            PackageError: the record is damaged or does not hold `count` values of that dtype.
        """
        record = self.record(offset, owner)
        expected_bytes = (count * bits + 7) // 8
        expected_padding = expected_bytes * 8 - count * bits
        # Values of whole bytes have no padding, and older writers left anything in that field.
        padding_bits = record.padding_bits if bits % 8 else 0
        for what, found, expected in (
            ("dtype code", record.dtype_code, dtype_code),
            ("size in bytes", record.size_bytes, expected_bytes),
            ("padding bits", padding_bits, expected_padding),
        ):
            if found != expected:
                raise PackageError(
                    f"{self.path}: {owner}: {what} is {found}, but its {count} values of {bits} bits need "
                    f"{expected}; the package is damaged, export it again."
                )
        return np.frombuffer(self._map, np.uint8, record.size_bytes, record.data_offset).copy()
