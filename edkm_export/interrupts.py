"""Ctrl-C and a polite kill, also where a library swallows them.

Some conversion code catches every exception and goes on. The signal is remembered, so that a command stops at the
next checkpoint of ours, before anything is put in its place.
"""

from __future__ import annotations

import signal
from types import FrameType

__all__ = ["check_interrupt", "watch_signals"]

_arrived = False


def watch_signals() -> None:
    """Make SIGINT and SIGTERM raise KeyboardInterrupt, and remember it. For the main thread of a command."""
    global _arrived
    _arrived = False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


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
