"""Files from outside are opened only if they are ordinary ones of a plausible size.

A pipe would block, a device never ends, and a sparse file of a terabyte takes no space until it is read. Symbolic
links are followed: hub caches consist of them. What is refused is an OSError, as other files that cannot be read.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import IO

__all__ = ["MOST_JSON_BYTES", "open_regular", "read_regular", "require_regular", "require_regular_folder"]

MOST_JSON_BYTES = 1 << 24
"""Of settings, manifests and metadata, which take thirty times that once they are read; the largest that are known have
2 MB. Vocabularies are read by tokenizers."""


_LARGE_BYTES = 1 << 30
_MOST_HOLES = 64  # file systems that compress make weights half as large at best, not a hundredth


def require_regular(path: str | Path, most_bytes: int | None = None) -> int:
    """Its size in bytes, if it is an ordinary file.

    Raises:
        OSError: it is missing, a folder, a pipe, a device or a loop of links, or has more than `most_bytes`.
    """
    return _checked(Path(path).stat(), path, most_bytes)


def open_regular(path: str | Path, most_bytes: int | None = None) -> IO[bytes]:
    """Open an ordinary file for reading.

    Raises:
        OSError: see `require_regular`.
    """
    # without the flag, opening a pipe waits for somebody to write into it
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _checked(os.fstat(descriptor), path, most_bytes)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | Path, most_bytes: int = MOST_JSON_BYTES) -> bytes:
    """Contents of an ordinary file.

    Raises:
        OSError: see `require_regular`.
    """
    with open_regular(path, most_bytes) as file:
        return file.read(most_bytes)


def require_regular_folder(folder: str | Path, suffixes: Iterable[str]) -> None:
    """Refuse a folder in which something that libraries will open by its name is no ordinary file.

    Args:
        folder: whose files are looked at, those of folders in it not.
        suffixes: of the names that matter, such as ".json".

    Raises:
        OSError: naming the file.
    """
    wanted = tuple(suffixes)
    for entry in sorted(os.scandir(folder), key=lambda each: each.name):
        if entry.name.endswith(wanted) and not entry.is_dir():
            require_regular(entry.path)


def _checked(status: os.stat_result, path: str | Path, most_bytes: int | None) -> int:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "is a pipe or a device, no ordinary file", str(path))
    if most_bytes is not None and status.st_size > most_bytes:
        raise OSError(
            errno.EFBIG, f"has {status.st_size:,} bytes; more than {most_bytes:,} are not read", str(path)
        )
    stored = getattr(status, "st_blocks", status.st_size // 512 + 1) * 512
    if status.st_size > _LARGE_BYTES and stored < status.st_size // _MOST_HOLES:
        raise OSError(
            errno.EFBIG,
            f"has {status.st_size:,} bytes, of which {stored:,} are on the disk: a sparse file, which no model is",
            str(path),
        )
    return status.st_size
