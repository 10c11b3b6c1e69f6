"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edkm_export.claims import claimed
from edkm_export.disk_space import disk_full, free_bytes, stopped_by_disk
from edkm_export.errors import InputError, OutputExistsError
from edkm_export.interrupts import check_interrupt
from edkm_export.regular_file import read_regular

__all__ = ["GENERATOR", "MARKER", "atomic_file", "atomic_folder", "check_output"]

MARKER = "metadata.json"
"""Every folder that we make holds one, with a `generator`; a folder without it is never replaced."""

GENERATOR = "edkm-export"


def check_output(path: str | Path, *, overwrite: bool, folder: bool = False) -> None:
    """Refuse, before the long work, an output that could not be written at its end.

    Args:
        path: what is to be written.
        overwrite: whether it may replace what is there.
        folder: whether it will be a folder or a file.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is false, is of the other kind, or is a folder that is not
            ours to replace.
        InputError: the folder that is to hold it does not exist or cannot be written.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        if path.is_dir() and not folder:
            raise OutputExistsError(f"{path} is a folder, not a file; choose another -o.")
        if path.is_file() and folder:
            raise OutputExistsError(f"{path} is a file, not a folder; choose another -o.")
        if not overwrite:
            raise OutputExistsError(
                f"{path} already exists; choose another -o, or replace it with --overwrite."
            )
        if folder and any(path.iterdir()) and not _is_ours(path):
            raise OutputExistsError(
                f"{path} is a folder that edkm-export did not make (its {MARKER} does not say so), so it is not "
                "replaced; choose another -o."
            )
    parent = path.absolute().parent
    if not parent.is_dir():
        raise InputError(f"{path}: its folder {parent} does not exist; make it first.")
    if not os.access(parent, os.W_OK):
        raise InputError(f"{path}: no permission to write to {parent}; choose another -o.")


def _is_ours(folder: Path) -> bool:
    try:
        metadata = json.loads(read_regular(folder / MARKER))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(metadata, dict) and str(metadata.get("generator", "")).startswith(GENERATOR)


@contextlib.contextmanager
def atomic_file(
    path: str | Path, *, overwrite: bool = False, needed_bytes: int | None = None
) -> Iterator[Path]:
    """Yield a temporary path beside `path`; flush it to disk and rename it on success, remove it on any error.

    Args:
        path: of the file.
        overwrite: replace one that exists.
        needed_bytes: about how large it will be, for messages; None: not known.

    Raises:
        OutputExistsError: see `check_output`; or another process writes it at the same time, or has written it
            meanwhile.
        InputError: see `check_output`.
        DiskFullError: there is no space for it.
    """
    path = Path(path)
    check_output(path, overwrite=overwrite)
    # In a folder of its own, so that the file has its final name: torch writes the name into the archive.
    with _full_disk(path, needed_bytes), claimed(path) as folder:
        temporary = folder / path.name
        with _watching_disk(path, folder):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        check_interrupt()
        if overwrite:
            temporary.replace(path)
        else:
            _place_file(temporary, path)


@contextlib.contextmanager
def atomic_folder(
    path: str | Path, *, overwrite: bool = False, needed_bytes: int | None = None
) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it on success, remove it on any error.

    The one that is replaced stays in place until the new one is complete. Arguments and errors are those of
    `atomic_file`.
    """
    path = Path(path)
    check_output(path, overwrite=overwrite, folder=True)
    with _full_disk(path, needed_bytes), claimed(path) as temporary:
        retired: Path | None = None
        try:
            with _watching_disk(path, temporary):
                yield temporary
                _fsync_tree(temporary)
            temporary.chmod(0o777 & ~_umask())
            check_interrupt()
            if path.exists():
                if not overwrite:
                    raise _taken(path)
                retired = Path(
                    tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.absolute().parent)
                )
                path.replace(retired)
            try:
                temporary.replace(path)
            except OSError as error:  # a rename never replaces a folder that holds something
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise _taken(path) from error
                raise
        finally:  # a signal can arrive between any two renames: what lies on disk decides, not how far we came
            if retired is not None and path.exists():
                shutil.rmtree(retired, ignore_errors=True)
            elif retired is not None:
                retired.replace(path)


def _place_file(temporary: Path, path: Path) -> None:
    """Give a file its name, unless something has it."""
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        raise _taken(path) from error
    except OSError as error:  # a file system without links
        if path.exists():
            raise _taken(path) from error
        temporary.replace(path)


def _taken(path: Path) -> OutputExistsError:
    return OutputExistsError(
        f"{path} was made by another process meanwhile; it is left as it is. Choose another -o, or replace it with "
        "--overwrite."
    )


class _Full(Exception):
    """The disk is full; found while the half-written output still takes the space, which counts as available."""

    def __init__(self, available_bytes: int | None) -> None:
        super().__init__()
        self.available_bytes = available_bytes


@contextlib.contextmanager
def _watching_disk(path: Path, written: Path) -> Iterator[None]:
    """Notice a full disk; `written` is the folder that holds what there is of the output."""
    try:
        yield
    except Exception as error:
        if not stopped_by_disk(error, path.absolute().parent):
            raise
        free = free_bytes(path)
        taken = sum(each.stat().st_size for each in written.rglob("*") if each.is_file())
        raise _Full(None if free is None else free + taken) from error


@contextlib.contextmanager
def _full_disk(path: Path, needed_bytes: int | None) -> Iterator[None]:
    """Explain a full disk, once what was written is removed."""
    try:
        yield
    except _Full as error:
        raise disk_full(path, needed_bytes, error.available_bytes) from error.__cause__


def _fsync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
