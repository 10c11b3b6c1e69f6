"""What the operating system does for files that appear whole or not at all: flushing, renaming, exchanging names."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from pathlib import Path

__all__ = ["exchange", "flush", "flush_tree", "remove"]

_AT_FDCWD = -100 if sys.platform == "linux" else -2
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS
# an old kernel, or a file system (NFS, FAT, some of FUSE) that cannot do it
_UNABLE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def exchange(first: Path, second: Path) -> bool:
    """Let two files or folders of one file system have each other's names, in one step (renameat2, renameatx_np).

    Returns:
        Whether that was done; False where the system or the file system cannot do it.

    Raises:
        OSError: one of them is missing, or may not be renamed.
    """
    name = {"linux": "renameat2", "darwin": "renameatx_np"}.get(sys.platform)
    call = None if name is None else getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), ctypes.c_uint(_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNABLE:
        return False
    raise OSError(number, os.strerror(number), str(first), None, str(second))


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before this returns."""
    is_folder = path.is_dir()
    if is_folder and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not is_folder or error.errno not in _UNABLE:  # some file systems flush no folders
            raise
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """`flush` everything in a folder, and then the folder."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder comes before it
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            flush(path)
    flush(folder)


def remove(path: Path, *, ignore_errors: bool = False) -> None:
    """Remove a file, a link, or a folder with all that is in it; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=ignore_errors)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:
        if not ignore_errors:
            raise
