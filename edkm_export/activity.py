"""What a long call is doing, and how far it has come, for whoever watches.

Library code names its activities and counts them; it knows nothing of terminals. Activities nest: the windows of one
stage lie inside of the stage. Nothing happens without a watcher.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from edkm_export.mapped_files import check_mapped_files

__all__ = ["Activity", "Watcher", "activity", "stages", "tracked", "watched_by"]

_T = TypeVar("_T")


@dataclass(eq=False)
class Activity:
    """Something that takes time.

    Attributes:
        words: what is done, as people say it: "reading model.pt".
        total: how much there is to do, in `unit`; None: not known.
        unit: what is counted, in the plural: "windows", "bytes"; empty: shares of the whole alone mean something.
        done: how much of it is done.
        detail: figures about it for people, such as the loss of a training step; empty: none.
        holds_interpreter: it is one native call, during which no other Python thread runs.
        started: when it began, by `time.monotonic`.
    """

    words: str
    total: float | None = None
    unit: str = ""
    done: float = 0.0
    detail: str = ""
    holds_interpreter: bool = False
    started: float = field(default_factory=time.monotonic)

    def advance(self, amount: float = 1) -> None:
        """Count what was done since the last call.

        Raises:
            InputError: see `mapped_files`.
        """
        check_mapped_files()
        self.done += amount

    @property
    def share(self) -> float | None:
        """From 0 to 1, never beyond; None: not known."""
        return None if not self.total else min(1.0, max(0.0, self.done / self.total))

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.started

    def rename(self, words: str) -> None:
        """Say what is done now, such as the next stage of several."""
        self.words = words
        if (watcher := _WATCHER.get()) is not None:
            watcher.renamed(self)


class Watcher(Protocol):
    """Who is told of activities. It may look at those that have begun at any time, from any thread."""

    def began(self, activity: Activity) -> None:
        """One began, inside of the last that has not ended."""

    def renamed(self, activity: Activity) -> None:
        """One that has begun goes on with something else."""

    def ended(self, activity: Activity) -> None:
        """The last that began has ended, well or not."""


_WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextlib.contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Tell a watcher what is done meanwhile; that of the surrounding code is told nothing."""
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


@contextlib.contextmanager
def activity(
    words: str, total: float | None = None, unit: str = "", *, holds_interpreter: bool = False
) -> Iterator[Activity]:
    """Say what is done meanwhile; the attributes of `Activity` are the arguments."""
    check_mapped_files()
    begun = Activity(words, total, unit, holds_interpreter=holds_interpreter)
    watcher = _WATCHER.get()
    if watcher is None:
        yield begun
        return
    watcher.began(begun)
    try:
        yield begun
    finally:
        watcher.ended(begun)


@contextlib.contextmanager
def stages(total: int) -> Iterator[Callable[[str], None]]:
    """Say which of so many stages is gone through; yields the function that announces the next one."""
    with activity("", total, "stages") as counted:

        def advance(name: str) -> None:
            if counted.words:
                counted.advance()  # the one before is done
            counted.rename(name)

        yield advance


def tracked(items: Iterable[_T], words: str, unit: str = "", *, total: float | None = None) -> Iterator[_T]:
    """The same items, counted while they are used; `total` is their number, where `len` does not tell it."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with activity(words, total, unit) as counted:
        for item in items:
            yield item
            counted.advance()
