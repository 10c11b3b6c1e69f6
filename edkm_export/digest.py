"""The sha256 of a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

from edkm_export.activity import activity
from edkm_export.regular_file import open_regular

__all__ = ["file_sha256"]

_CHUNK = 1 << 24


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
