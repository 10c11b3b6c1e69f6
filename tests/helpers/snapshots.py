"""What lies in a folder, to show that a command which failed changed nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["snapshot"]


def snapshot(folder: Path) -> dict[str, str]:
    """{path below the folder: sha256 of a file, kind of anything else}, hidden names included."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            content = f"link to {path.readlink()}"
        elif path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            content = "folder" if path.is_dir() else "special"
        found[str(path.relative_to(folder))] = content
    return found
