"""Files of `torch.save` from outside, read without running code and within bounds.

`weights_only=True` keeps code out. What it leaves is size: an archive may be compressed, so that a megabyte becomes
gigabytes, and a pickle makes an object of each of its bytes. So the archive is looked through first: nothing in it is
compressed, and its pickle is as small as those of models are. Tensors are mapped, not read.
"""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from edkm_export.regular_file import open_regular

__all__ = ["UnsafeArchiveError", "check_archive", "load_archive"]

_MOST_PICKLE_BYTES = 4 << 20  # a tensor takes some 250 bytes; an object of one byte takes some 200 in memory
_MOST_DIRECTORY_BYTES = 32 << 20  # of names and offsets: 100 bytes and more for each tensor
# ends of the directory, and where the longer form of it lies (APPNOTE.TXT 4.3.14 to 4.3.16)
_SATURATED = 0xFFFFFFFF
_END, _LOCATOR, _END64 = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"


class UnsafeArchiveError(ValueError):
    """A file that is no archive of plain tensors, or one that would take more memory than it has bytes.

    Attributes:
        holds_code: it holds more than plain data, so that loading it could run code.
    """

    def __init__(self, message: str, *, holds_code: bool = False) -> None:
        super().__init__(message)
        self.holds_code = holds_code


def load_archive(path: str | Path, *, mapped: bool = True) -> Any:
    """What `torch.save` wrote: plain Python and tensors, on the CPU.

    Args:
        path: of the file.
        mapped: leave tensors in the file; else they are read.

    Raises:
        UnsafeArchiveError: it cannot be read, or must not be.
        OSError: it cannot be opened, or is no ordinary file.
    """
    with open_regular(path) as file:
        check_archive(file, os.fstat(file.fileno()).st_size)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UnsafeArchiveError(_first_line(error), holds_code=True) from error
    except OSError:
        raise
    except Exception as error:  # what the pickle machine and the archive raise has no common base
        raise UnsafeArchiveError(_first_line(error)) from error


def check_archive(file: IO[bytes], size: int) -> None:
    """Refuse an archive that would take more memory than it has bytes.

    Args:
        file: open for reading.
        size: of it, in bytes.

    Raises:
        UnsafeArchiveError: it is one, or is no archive of `torch.save`.
    """
    directory = _directory_bytes(file, size)
    if directory is None:
        raise UnsafeArchiveError("is no archive of torch.save, or a truncated one")
    if directory > _MOST_DIRECTORY_BYTES:
        raise UnsafeArchiveError(f"its directory has {directory:,} bytes")
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except Exception as error:  # damaged directories raise errors of struct, of text and of their own
        raise UnsafeArchiveError(_first_line(error)) from error
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
            raise UnsafeArchiveError(
                f"its part {entry.filename[:80]!r} is compressed, or longer than the file"
            )
        if entry.filename.endswith(".pkl") and entry.file_size > _MOST_PICKLE_BYTES:
            raise UnsafeArchiveError(
                f"its part {entry.filename[:80]!r} has {entry.file_size:,} bytes; more than {_MOST_PICKLE_BYTES:,} are "
                "not read"
            )


def _directory_bytes(file: Any, size: int) -> int | None:
    """Length of the archive's directory, which lies at its end; None where it does not.

    An archive that could be read in two ways, with a comment or something before it, is none of torch.save.
    """
    file.seek(max(0, size - 22 - 20))
    tail = file.read()
    if len(tail) < 22 or tail[-22:-18] != _END:
        return None
    length, offset, comment = struct.unpack("<IIH", tail[-10:])
    if comment:
        return None
    end = size - 22
    if tail[:-22][:4] == _LOCATOR and len(tail) == 42:  # torch writes the longer form too, whatever the size
        (end,) = struct.unpack_from("<Q", tail, 8)
        if end + 56 != size - 42:
            return None
        file.seek(end)
        told = file.read(56)
        long_length, long_offset = struct.unpack_from("<QQ", told, 40)
        if (
            told[:4] != _END64
            or length not in (long_length, _SATURATED)
            or offset not in (long_offset, _SATURATED)
        ):
            return None
        length, offset = long_length, long_offset
    return int(length) if offset + length == end else None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
