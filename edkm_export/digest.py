"""The sha256 of files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edkm_export.activity import activity
from edkm_export.regular_file import open_regular

__all__ = ["file_sha256", "file_sha256s"]

_CHUNK = 1 << 24
_THREADS = 4  # files that are hashed at once


def file_sha256(path: Path) -> str:
    """In hexadecimal digits; the file is read in pieces.

    Raises:
        OSError: it cannot be read.
    """
    sha = hashlib.sha256()
    with (
        open_regular(path) as file,
        activity(f"hashing {path.name}", path.stat().st_size, "bytes") as hashing,
    ):
        while chunk := file.read(_CHUNK):
            sha.update(chunk)
            hashing.advance(len(chunk))
    return sha.hexdigest()


def file_sha256s(paths: Sequence[Path]) -> dict[Path, str]:
    """Of several files, some at once.

    Raises:
        OSError: one cannot be read.
    """
    if len(paths) < 2:
        return {path: file_sha256(path) for path in paths}
    with (
        activity("hashing", sum(path.stat().st_size for path in paths), "bytes") as hashing,
        ThreadPoolExecutor(min(_THREADS, len(paths))) as pool,
    ):
        found = {}
        for path, digest in zip(paths, pool.map(file_sha256, paths), strict=True):
            found[path] = digest
            hashing.advance(path.stat().st_size)
    return found
