"""The temporary folder beside an output: only one process at a time can have it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edkm_export.errors import OutputExistsError

__all__ = ["claimed"]


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which is removed in the end unless it was renamed.

    Its name follows from that of `path`, and a lock of the operating system on it, which ends with the process, tells
    one that is in use from one that a killed process left.

    Raises:
        OutputExistsError: another process is writing `path`.
    """
    parent = path.absolute().parent
    folder = parent / f".{path.name}.partial"
    descriptor = _lock(folder, path)
    if descriptor is None:  # no locks here: a name that nobody else has must do
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=parent))
    try:
        yield folder
    finally:
        # Once ours was renamed, another process may have made one of this name.
        if descriptor is None or _is_same(folder, descriptor):
            shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _lock(folder: Path, path: Path) -> int | None:
    """Make and lock a folder; None where the system or the file system knows no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # its owner has just finished
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise OutputExistsError(
                f"{path} is being written by another process; wait for it, or choose another -o."
            ) from error
        except OSError:
            os.close(descriptor)
            return None
        if _is_same(folder, descriptor):
            for left in folder.iterdir():  # by a process that was killed
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            return descriptor
        os.close(descriptor)  # renamed or removed by its owner before the lock was ours


def _is_same(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
