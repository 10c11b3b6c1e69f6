"""A disk that is full, or a quota that is reached, in one sentence."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from edkm_export.errors import ConversionError, DiskFullError
from edkm_export.limits import causes, words_of

__all__ = ["disk_full", "explain", "free_bytes", "is_disk_full", "require_space", "stopped_by_disk"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
# how libraries in other languages put it, which give no error number
_WORDS = ("no space left on device", "disk quota exceeded", *(f"os error {number}" for number in _FULL))
_NOTHING = 1 << 16  # bytes; a write that failed for want of space leaves less
# what torch and coremltools raise for a write that failed, whatever the reason
_VAGUE = (OSError, RuntimeError, SystemError, ConversionError)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that there is no space left."""
    return any(
        getattr(each, "errno", None) in _FULL or any(words in words_of(each).lower() for words in _WORDS)
        for each in causes(error)
    )


def stopped_by_disk(error: Exception, path: Path) -> bool:
    """Whether a failed write of `path` was for want of space: the error says so, or nothing is free."""
    if is_disk_full(error):
        return True
    free = free_bytes(path)
    return isinstance(error, _VAGUE) and free is not None and free < _NOTHING


def disk_full(
    path: Path, needed_bytes: int | None = None, available_bytes: int | None = None
) -> DiskFullError:
    """The error of an output that does not fit; what was written of it is taken to be removed.

    Args:
        path: of the output.
        needed_bytes: size of it; None: not known.
        available_bytes: what was free before it was begun; None: what is free now.
    """
    free = free_bytes(path) if available_bytes is None else available_bytes
    known = [f"{needed_bytes:,} bytes are needed"] if needed_bytes else []
    known += [] if free is None else [f"{free:,} bytes are free"]
    found = f" ({', '.join(known)})" if known else ""
    error = DiskFullError(
        f"{path}: no space left on the device, or a quota is reached{found}; nothing was left behind. "
        "Free some space, or choose another place."
    )
    error.errno = errno.ENOSPC
    return error


def require_space(path: Path, needed_bytes: int) -> None:
    """Refuse, before the long work, an output that could not be written at its end.

    Raises:
        DiskFullError: less than `needed_bytes` are free where `path` is to be.
    """
    free = free_bytes(path)
    if free is not None and free < needed_bytes:
        raise disk_full(path, needed_bytes)


def free_bytes(path: Path) -> int | None:
    """Of the file system that holds `path` or is to hold it; None: not known."""
    for folder in (path, *path.absolute().parents):
        try:
            return shutil.disk_usage(folder).free
        except OSError:  # it does not exist yet
            continue
    return None


def explain(error: OSError) -> str:
    """One sentence for the user about an error of the operating system."""
    if is_disk_full(error) and error.filename is not None:
        return str(disk_full(Path(error.filename)))
    if is_disk_full(error):
        return "no space left on the device that was written to, or a quota is reached. Free some space."
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"
