"""Ctrl-C and a polite kill, also where a library swallows them.

Some conversion code catches every exception and goes on. The signal is remembered, so that a command stops at the
next checkpoint of ours, before anything is put in its place.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

__all__ = ["check_interrupt", "watching_signals"]

_arrived = False


@contextlib.contextmanager
def watching_signals() -> Iterator[None]:
    """Make SIGINT and SIGTERM raise KeyboardInterrupt, and remember them. For the main thread of a command."""
    global _arrived
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
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
    """
    if _arrived:
        raise KeyboardInterrupt
