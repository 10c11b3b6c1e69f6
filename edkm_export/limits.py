"""Limits of the system, memory and open files, told from the errors that libraries make of them."""

from __future__ import annotations

import errno
from collections.abc import Iterator

__all__ = ["causes", "is_out_of_files", "is_out_of_memory", "words_of"]

# how torch, numpy's and onnxruntime's C++, the loader of shared libraries and Python's threads put it
_WORDS = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "bad allocation",
    "failed to allocate memory",
    "failed to map segment",
    "cannot create executable memory",
    "can't start new thread",
    "unable to allocate",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that there is no more memory, or no more for this process."""
    return any(
        isinstance(each, MemoryError)
        or getattr(each, "errno", None) == errno.ENOMEM
        or (
            isinstance(each, (OSError, RuntimeError, ImportError, SystemError))
            and any(words in words_of(each).lower() for words in _WORDS)
        )
        for each in causes(error)
    )


def is_out_of_files(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that no more files can be open at once."""
    return any(
        getattr(each, "errno", None) in (errno.EMFILE, errno.ENFILE)
        or "too many open files" in words_of(each).lower()
        for each in causes(error)
    )


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it came of."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


def words_of(error: BaseException) -> str:
    """What an error says; nothing, where it cannot say it."""
    try:
        return str(error)
    except Exception:
        return ""
