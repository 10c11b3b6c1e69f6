"""Ctrl-C, a polite kill and a terminal that is closed, also where a library swallows them.

Some conversion code catches every exception and goes on. The signal is remembered, so that a command stops at the
next checkpoint of ours, before anything is put in its place.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from edkm_export.mapped_files import check_mapped_files, guarding_mapped_files

__all__ = ["SIGNALS", "check_interrupt", "watching_signals"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
"""What ends a command in order."""

_arrived = False


@contextlib.contextmanager
def watching_signals() -> Iterator[None]:
    """Make `SIGNALS` raise KeyboardInterrupt, and remember them. For the main thread of a command.

    Mapped files are guarded too, see `mapped_files`. Under nohup SIGHUP is ignored, and stays so.
    """
    global _arrived
    before = {
        number: signal.signal(number, _interrupt)
        for number in SIGNALS
        if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        with guarding_mapped_files():
            yield
    finally:
        _arrived = False
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    global _arrived
    _arrived = True
    raise KeyboardInterrupt


def check_interrupt() -> None:
    """Stop now if a signal has arrived and was swallowed.

    Raises:
        KeyboardInterrupt: it was.
        InputError: a mapped file became shorter.
    """
    if _arrived:
        raise KeyboardInterrupt
    check_mapped_files()
