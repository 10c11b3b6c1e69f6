"""The temporary folder beside an output: only one process at a time can have it.

`.NAME.partial` lies beside NAME and is locked by the operating system, which ends with the process: so one that is in
use is told from one that a killed process left, and the next run of the same output takes that over, empty. On file
systems without locks its name holds host and process instead.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edkm_export.errors import OutputExistsError
from edkm_export.filesystem import exchange, flush, remove

__all__ = ["claimed", "clear", "is_leftover", "refuse_claimed", "replace_folder", "restore", "whole"]

_BUSY = -1


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which is removed in the end with what is in it.

    Raises:
        OutputExistsError: another process is writing `path`.
    """
    folder = _partial(path)
    descriptor = _claim(folder, path)
    if descriptor is None:  # no locks here: a name that nobody else has must do
        _remove_orphans(path)
        folder = Path(tempfile.mkdtemp(prefix=_owned_prefix(path), suffix=".partial", dir=folder.parent))
    try:
        yield folder
    finally:
        if descriptor is None or _is_same(folder, descriptor):
            _restore(folder, path)
            remove(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def refuse_claimed(path: Path) -> None:
    """Raise if another process is writing `path` now.

    Raises:
        OutputExistsError: it is.
    """
    with contextlib.suppress(FileNotFoundError):
        descriptor = _lock(_partial(path))
        if descriptor == _BUSY:
            raise _busy(path)
        if descriptor is not None:
            os.close(descriptor)


def clear(path: Path) -> None:
    """Remove what a process which was killed left beside `path`, when that is not written again."""
    if _partial(path).exists():
        with contextlib.suppress(OutputExistsError), claimed(path):
            pass


def replace_folder(made: Path, path: Path) -> None:
    """Put a folder, which lies in a claimed one, in the place of one that exists; that is removed with the claim.

    Where names cannot be exchanged, the old one lies in the claimed folder for a moment, while none has its name. If
    the process is killed just then, the next one that is to write `path` brings it back.
    """
    if not exchange(made, path):
        try:
            path.replace(_old(made.parent, path))
            made.replace(path)
        finally:  # a signal can arrive between the two: what lies on disk decides, not how far we came
            _restore(made.parent, path)
    flush(whole(path).parent)


def restore(path: Path) -> None:
    """Bring a folder back that a process which was killed in `replace_folder` had taken out of its place."""
    folder = _partial(path)
    if not _old(folder, path).is_dir():
        return
    descriptor = _lock(folder)
    if descriptor != _BUSY:
        _restore(folder, path)
        if descriptor is not None:
            os.close(descriptor)


def whole(path: Path) -> Path:
    """A path with all folders, and with a name: "." has none."""
    return Path(os.path.abspath(path))  # noqa: PTH100  # Path.absolute keeps ".."


def is_leftover(path: Path) -> bool:
    """Whether a name is one that `claimed` gives."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def _partial(path: Path) -> Path:
    path = whole(path)
    return path.parent / f".{path.name}.partial"


def _old(folder: Path, path: Path) -> Path:
    """In a claimed folder: what it is to replace, where names cannot be exchanged."""
    return folder / f"{whole(path).name}.old"


def _restore(folder: Path, path: Path) -> None:
    old = _old(folder, path)
    if old.is_dir() and not os.path.lexists(path):
        old.replace(path)


def _claim(folder: Path, path: Path) -> int | None:
    """Make and lock a folder, and empty it; None where the system or the file system knows no locks."""
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        try:
            descriptor = _lock(folder)
        except FileNotFoundError:  # its owner has just finished
            continue
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise OutputExistsError(
                    f"{folder} is in the way, and no folder of ours; remove it."
                ) from error
            raise
        if descriptor == _BUSY:
            raise _busy(path)
        if descriptor is None:
            _restore(folder, path)
            with contextlib.suppress(OSError):
                folder.rmdir()
            return None
        if _is_same(folder, descriptor):
            _restore(folder, path)
            for left in folder.iterdir():  # by a process that was killed
                remove(left)
            return descriptor
        os.close(descriptor)  # removed by its owner before the lock was ours


def _lock(folder: Path) -> int | None:
    """A descriptor of a folder that is now locked; None: there are no locks here; `_BUSY`: it is another process's."""
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return _BUSY
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _busy(path: Path) -> OutputExistsError:
    return OutputExistsError(
        f"{path} is being written by another process; wait for it, or choose another -o."
    )


def _owned_prefix(path: Path) -> str:
    return f"{_host_prefix(path)}{os.getpid()}."


def _host_prefix(path: Path) -> str:
    return f".{whole(path).name}.{re.sub('[^A-Za-z0-9]', '-', platform.node())[:40]}."


def _remove_orphans(path: Path) -> None:
    """Folders of processes of this host that have ended; for where there are no locks."""
    prefix = _host_prefix(path)
    for folder in whole(path).parent.iterdir():
        process = folder.name.removeprefix(prefix).partition(".")[0]
        named = folder.name.startswith(prefix) and is_leftover(folder) and process.isdecimal()
        if named and not _is_alive(int(process)):
            _restore(folder, path)
            remove(folder)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is another user's
        return True
    return True


def _is_same(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
