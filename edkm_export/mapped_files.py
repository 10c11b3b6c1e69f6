"""A file that becomes shorter while it is mapped.

Reading what is gone ends the process with SIGBUS: no library that maps files (torch, safetensors, our readers) can turn
that into an error. Here zeros take the place of what is gone, so that the code that reads goes on, and the next check
raises an error that names the file: when an activity begins or advances, before an output gets its place, and before a
command ends, well or with another error.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from edkm_export.errors import InputError

__all__ = ["check_mapped_files", "guarding_mapped_files"]

# proc_pid_maps(5); of what can be read and is no code: gaps between the parts of a library lie beyond its end
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r[w-]-[ps] ([0-9a-f]+) \S+ (\d+) +(/.*)")
_ZEROS = 0x10 | getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)  # and MAP_FIXED of Linux

_gone: list[str] = []


@contextlib.contextmanager
def guarding_mapped_files() -> Iterator[None]:
    """Survive that a mapped file becomes shorter; on Linux, and for the whole process."""
    if sys.platform != "linux":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mmap.restype = libc.signal.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    ]  # fmt: skip
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]

    def fill(_number: int) -> None:
        found = list(_missing())
        if not found:  # it is something else, such as broken memory: die of it
            libc.signal(signal.SIGBUS, None)
            return
        for start, size, path in found:
            libc.mmap(start, size, mmap.PROT_READ | mmap.PROT_WRITE, _ZEROS, -1, 0)
            _gone.append(path)

    # Python's own handlers run between two of its steps, but the read that failed would fail again before.
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(fill)
    before = libc.signal(signal.SIGBUS, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGBUS, before)
        _gone.clear()


def check_mapped_files(*, look: bool = False) -> None:
    """Stop now if a mapped file became shorter.

    Args:
        look: look for one now, too: the system answers EFAULT where it was to read what is gone itself.

    Raises:
        InputError: one did; zeros may have been read in its place.
    """
    if look and sys.platform == "linux":
        _gone.extend(path for _, _, path in _missing())
    if _gone:
        raise InputError(
            f"{_gone[0]}: became shorter while it was read; write it again, and change no file that is in use."
        )


def _missing() -> Iterator[tuple[int, int, str]]:
    """Address, bytes and file of each mapped part that lies beyond the end of its file, in whole pages."""
    for line in Path("/proc/self/maps").read_bytes().splitlines():
        found = _LINE.fullmatch(os.fsdecode(line))
        if found is None:
            continue
        start, end, offset = (int(found.group(group), 16) for group in (1, 2, 3))
        path = found.group(5).removesuffix(" (deleted)")
        try:
            held = Path(path).stat()
        except OSError:  # removed: what was mapped is still there
            continue
        if held.st_ino != int(found.group(4)):  # another file has its name
            continue
        whole = -(-held.st_size // mmap.PAGESIZE) * mmap.PAGESIZE
        first = max(start, start + whole - offset)
        if first < end:
            yield first, end - first, path
