"""What a command shows while it works: rows that move in a terminal, a line every few seconds in a pipe."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from edkm_export.activity import Activity
from edkm_export.cli.pulse import Pulse, duration
from edkm_export.escaping import for_terminal

__all__ = ["Display", "figure"]

_PLAIN_EVERY_S = 7.0  # a busy interpreter may delay a line by some seconds, and none may take more than ten
_FRAMES_PER_S = 8
_PAUSE_S = 1.0
_BAR_WIDTH = 16
_DEPTH = 3  # rows at most: what is inside of more is of no use to a reader


class Display:
    """Shows activities on a console.

    Args:
        console: of standard error.
        moving: whether it is a terminal that can draw over its lines.
        log: gets a line about each activity.
    """

    def __init__(self, console: Console, *, moving: bool, log: Callable[[str], None]) -> None:
        self._console, self._log = console, log
        self._stack: list[Activity] = []
        self._spoke = time.monotonic()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._live: Live | None = None
        self._pulse: tuple[Activity, Pulse] | None = None
        self._spinner = Spinner("dots")
        if moving:
            self._live = Live(
                get_renderable=self._render,
                console=console,
                transient=True,
                refresh_per_second=_FRAMES_PER_S,
                redirect_stdout=False,  # it may be a pipe that wants no control characters
            )

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show what happens meanwhile."""
        if self._live is not None:
            self._live.start()
        else:
            self._thread = threading.Thread(target=self._speak_regularly, daemon=True)
            self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            if self._live is not None:
                self._live.stop()
            if self._thread is not None:
                self._thread.join()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Leave the terminal to somebody else meanwhile."""
        if self._live is None or not self._live.is_started:
            yield
            return
        self._live.stop()
        try:
            yield
        finally:
            self._live.start()

    def spoke(self) -> None:
        """Something else was printed, so that nobody waits for a sign of life."""
        self._spoke = time.monotonic()

    def began(self, activity: Activity) -> None:
        """See `edkm_export.activity.Watcher`."""
        self._stack.append(activity)
        if activity.words:
            self._log(activity.words)
        if activity.holds_interpreter:
            self._start_pulse(activity)

    def renamed(self, activity: Activity) -> None:
        """See `edkm_export.activity.Watcher`."""
        if self._live is None:
            self._console.print(f"- {activity.words}")
        else:
            self._log(activity.words)

    def ended(self, activity: Activity) -> None:
        """See `edkm_export.activity.Watcher`."""
        if self._pulse is not None and self._pulse[0] is activity:
            self._stop_pulse()
        if activity in self._stack:  # a loop that was left early ends late: others may have gone on meanwhile
            del self._stack[self._stack.index(activity) :]
        self._log(f"{activity.words}: ended after {activity.seconds:.2f} s")

    def _start_pulse(self, activity: Activity) -> None:
        """Let another process show it: no thread of this one will run."""
        shown = self._live.is_started if self._live is not None else self._thread is not None
        if not shown or self._pulse is not None:
            return
        try:
            descriptor = self._console.file.fileno()
        except (OSError, ValueError):  # a stream in memory
            return
        moving = self._live is not None
        if self._live is not None:
            self._live.stop()
            words = for_terminal(activity.words)[: max(8, self._console.width - 16)]
        else:
            words = for_terminal(_named(self._stack))
        since = activity if moving else self._stack[0]
        every = 1 / _FRAMES_PER_S if moving else _PLAIN_EVERY_S
        self._pulse = activity, Pulse(descriptor, words, since.seconds, every, moving=moving)

    def _stop_pulse(self) -> None:
        assert self._pulse is not None
        self._pulse[1].stop()
        self._pulse = None
        self.spoke()
        if self._live is not None:
            self._live.start()

    def _speak_regularly(self) -> None:
        while not self._over.wait(0.5):
            silent = self._pulse is None and time.monotonic() - self._spoke >= _PLAIN_EVERY_S
            if silent and (stack := list(self._stack)):
                self._console.print(f"- {_line(stack)}")

    def _render(self) -> RenderableType:
        stack = [each for each in list(self._stack) if each.words]
        shown = stack[1:][-_DEPTH:] or stack
        if not shown or (len(stack) == 1 and time.monotonic() - self._spoke < _PAUSE_S):
            return Text("")  # between two lines of a result, nothing is to flicker
        figures = [
            f"{figure(each, short=True)}  {duration(each.seconds)}".strip() for each in shown
        ]  # of one moment: their width is used
        room = self._console.width - max(map(cell_len, figures)) - _BAR_WIDTH - 6
        rows = Table.grid(padding=(0, 1, 0, 0))
        details = []
        for number, (activity, found) in enumerate(zip(shown, figures, strict=True)):
            words = Text(for_terminal(activity.words))
            words.truncate(max(8, room), overflow="ellipsis")
            bar = (
                ""
                if activity.share is None
                else ProgressBar(total=1.0, completed=activity.share, width=_BAR_WIDTH)
            )
            rows.add_row(self._spinner if number == 0 else "", words, bar, Text(found, no_wrap=True))
            if activity.detail:
                details.append(Text(f"  {for_terminal(activity.detail)}", no_wrap=True, overflow="ellipsis"))
        return Group(rows, *details)


def _line(stack: list[Activity]) -> str:
    """Activities that lie inside of each other in one line, for a pipe."""
    return f"{_named(stack)}, {duration(stack[0].seconds)} so far"


def _named(stack: list[Activity]) -> str:
    """The same without the time."""
    named = [each for each in stack[1:] if each.words] or stack[:1]
    parts = [f"{each.words}: {found}" if (found := figure(each)) else each.words for each in named]
    details = [each.detail for each in named if each.detail]
    return ", ".join(["; ".join(parts), *details])


def figure(activity: Activity, *, short: bool = False) -> str:
    """How much is done: "50% (2 of 4 windows)", or "50% 2/4" when it is to be short; empty: not known."""
    share, unit = activity.share, activity.unit
    if share is None or activity.total is None:
        return f"{activity.done:,.0f} {unit}" if activity.done and unit else ""
    percent = f"{share:.0%}"
    if not unit:
        return percent
    done = share * activity.total
    if unit == "bytes":
        total = f"{activity.total / 1e6:,.1f} MB"
        return (
            f"{percent} {done / 1e6:,.1f}/{total}" if short else f"{percent} ({done / 1e6:,.1f} of {total})"
        )
    if short:
        return f"{percent} {done:,.0f}/{activity.total:,.0f} {unit}"
    return f"{percent} ({done:,.0f} of {activity.total:,.0f} {unit})"
