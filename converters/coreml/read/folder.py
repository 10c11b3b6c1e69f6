"""Where the packages of an exported folder lie."""

from __future__ import annotations

import json
from pathlib import Path

from edkm_export.atomic import MARKER
from edkm_export.errors import PackageError
from edkm_export.regular_file import read_regular

__all__ = ["find_package"]


def find_package(path: str | Path) -> Path:
    """The .mlpackage that a user means: itself, or the first one in the folder that `edkm-export coreml` made.

    Raises:
        PackageError: there is none, or it is not clear which.
    """
    path = Path(path)
    if not path.exists():
        raise PackageError(f"{path}: no such package.")
    if path.suffix == ".mlpackage" or (path / "Manifest.json").is_file():
        return path
    found = sorted(path.glob("*.mlpackage")) if path.is_dir() else []
    if len(found) > 1 and (first := _first_of(path)) in found:
        return first
    if len(found) != 1:
        raise PackageError(f"{path}: expected an .mlpackage, or a folder with one in it; found {len(found)}.")
    return found[0]


def _first_of(folder: Path) -> Path | None:
    """The package that metadata.json names, if it can be read."""
    try:
        name = json.loads(read_regular(folder / MARKER))["package"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return folder / name if isinstance(name, str) else None
