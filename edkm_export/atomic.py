"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from edkm_export.claims import claimed, is_leftover, replace_folder, restore, whole
from edkm_export.disk_space import disk_full, free_bytes, stopped_by_disk
from edkm_export.errors import InputError, OutputExistsError
from edkm_export.filesystem import flush, flush_tree
from edkm_export.interrupts import check_interrupt
from edkm_export.plain_data import is_utf8, printable
from edkm_export.regular_file import read_regular

__all__ = [
    "GENERATOR",
    "MARKER",
    "atomic_file",
    "atomic_files",
    "atomic_folder",
    "check_output",
    "made_folder",
    "place_folder",
]

MARKER = "metadata.json"
"""Every folder that we make holds one, with a `generator`; a folder without it is never replaced."""

GENERATOR = "edkm-export"


def check_output(
    path: str | Path,
    *,
    overwrite: bool,
    folder: bool = False,
    is_ours: Callable[[Path], bool] | None = None,
    in_place: bool = False,
) -> None:
    """Refuse, before the long work, an output that could not be written at its end.

    Args:
        path: what is to be written.
        overwrite: whether it may replace what is there.
        folder: whether it will be a folder or a file.
        is_ours: whether a folder that is there may be replaced; None: if its `MARKER` says so.
        in_place: it is not replaced, but written into.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is false, is of the other kind, or is a folder that is not
            ours to replace.
        InputError: the folder that is to hold it does not exist or cannot be written; a name is not UTF-8.
    """
    path = Path(path)
    if not is_utf8(str(path)):
        raise InputError(f"{printable(str(path))}: the name is not UTF-8 text; choose another -o.")
    if folder:
        with contextlib.suppress(OSError):
            restore(path)
    if path.exists() or path.is_symlink():
        if path.is_dir() and not folder:
            raise OutputExistsError(f"{path} is a folder, not a file; choose another -o.")
        if path.is_file() and folder:
            raise OutputExistsError(f"{path} is a file, not a folder; choose another -o.")
        if not overwrite:
            raise OutputExistsError(
                f"{path} already exists; choose another -o, or replace it with --overwrite."
            )
        if folder:
            _check_ours(path, is_ours or _has_marker)
            if not in_place:
                _check_replaceable(path)
    parent = whole(path).parent
    if not parent.is_dir():
        raise InputError(f"{path}: its folder {parent} does not exist; make it first.")
    if not os.access(parent, os.W_OK):
        raise InputError(f"{path}: no permission to write to {parent}; choose another -o.")


def _check_ours(path: Path, is_ours: Callable[[Path], bool]) -> None:
    if any(not is_leftover(each) for each in path.iterdir()) and not is_ours(path):
        raise OutputExistsError(
            f"{path} is a folder that edkm-export did not make (its {MARKER} does not say so), so it is not "
            "replaced; choose another -o."
        )


def _check_replaceable(path: Path) -> None:
    if path.is_symlink():
        raise OutputExistsError(f"{path} is a link; name the folder itself, {path.resolve()}, or another -o.")
    if os.path.ismount(path):
        raise OutputExistsError(f"{path} is a mount point, which nothing can replace; name a folder in it.")


def _has_marker(folder: Path) -> bool:
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
        temporary = folder / whole(path).name
        with _watching_disk(path, folder):
            yield temporary
            flush(temporary)
        check_interrupt()
        if overwrite:
            temporary.replace(path)
        else:
            _place_file(temporary, path)
        flush(whole(path).parent)


@contextlib.contextmanager
def atomic_files(folder: Path, name: str) -> Iterator[Path]:
    """Yield a temporary folder in one that exists; on success its files are put into that one, on any error none is.

    Files of these names are replaced. A process that is killed meanwhile leaves each as it was, or whole.

    Args:
        folder: to hold them.
        name: of what they are together, for messages.

    Raises:
        OutputExistsError: another process writes them at the same time.
        DiskFullError: there is no space for them.
    """
    with _full_disk(folder / name, None), claimed(folder / name) as temporary:
        with _watching_disk(folder / name, temporary):
            yield temporary
            flush_tree(temporary)
        check_interrupt()
        for file in sorted(temporary.iterdir()):
            file.replace(folder / file.name)
        flush(folder)


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder and those above it, if they are not there; on any error, those that hold nothing go again."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for each in missing:
                each.rmdir()
        raise


@contextlib.contextmanager
def atomic_folder(
    path: str | Path,
    *,
    overwrite: bool = False,
    needed_bytes: int | None = None,
    is_ours: Callable[[Path], bool] | None = None,
) -> Iterator[Path]:
    """Yield an empty temporary folder of the same name; give it its place on success, remove it on any error.

    The one that is replaced stays in place until the new one is complete, and both exchange their names in one step
    where the system can do that. Arguments and errors are those of `atomic_file` and `check_output`.
    """
    path = Path(path)
    check_output(path, overwrite=overwrite, folder=True, is_ours=is_ours)
    with _full_disk(path, needed_bytes), claimed(path) as folder:
        temporary = folder / whole(path).name
        temporary.mkdir()
        with _watching_disk(path, folder):
            yield temporary
            flush_tree(temporary)
        check_interrupt()
        place_folder(temporary, path, overwrite=overwrite)


def place_folder(made: Path, path: Path, *, overwrite: bool) -> None:
    """Give a folder, which lies in a claimed one, its place.

    Raises:
        OutputExistsError: something has its place; with `overwrite`, something that is no folder.
    """
    try:
        if overwrite and path.is_dir() and not path.is_symlink():
            replace_folder(made, path)
        else:
            if os.path.lexists(path) and not overwrite:
                raise _taken(path)
            made.replace(path)  # which never replaces a folder that holds something
            flush(whole(path).parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _taken(path) from error
        raise


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
