"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edkm_export.errors import InputError, OutputExistsError

__all__ = ["MARKER", "atomic_file", "atomic_folder", "check_output"]

MARKER = "metadata.json"  # every folder of ours holds one; a folder without it is never replaced


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse, before the long work, an output that could not be written at its end.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is false, or it is a folder that is not ours to replace.
        InputError: the folder that is to hold it does not exist or cannot be written.
    """
    if path.exists() or path.is_symlink():
        if not overwrite:
            raise OutputExistsError(
                f"{path} already exists; choose another -o, or replace it with --overwrite."
            )
        if path.is_dir() and any(path.iterdir()) and not (path / MARKER).is_file():
            raise OutputExistsError(
                f"{path} is a folder that edkm-export did not make (it has no {MARKER}), so it is not replaced; "
                "choose another -o."
            )
    parent = path.absolute().parent
    if not parent.is_dir():
        raise InputError(f"{path}: its folder {parent} does not exist; make it first.")
    if not os.access(parent, os.W_OK):
        raise InputError(f"{path}: no permission to write to {parent}; choose another -o.")


@contextlib.contextmanager
def atomic_file(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; flush it to disk and rename it on success, remove it on any error.

    Raises:
        OutputExistsError, InputError: see `check_output`.
    """
    check_output(path, overwrite=overwrite)
    if path.is_dir():
        raise OutputExistsError(f"{path} is a folder, not a file; choose another -o.")
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.absolute().parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it on success, remove it on any error.

    The one that is replaced stays in place until the new one is complete.

    Raises:
        OutputExistsError, InputError: see `check_output`.
    """
    check_output(path, overwrite=overwrite)
    if path.is_file():
        raise OutputExistsError(f"{path} is a file, not a folder; choose another -o.")
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.absolute().parent))
    retired: Path | None = None
    try:
        yield temporary
        _fsync_tree(temporary)
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            retired = Path(
                tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.absolute().parent)
            )
            path.replace(retired)
        try:
            temporary.replace(path)
        except BaseException:
            if retired is not None:
                retired.replace(path)
                retired = None
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if retired is not None:
            shutil.rmtree(retired, ignore_errors=True)


def _fsync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
