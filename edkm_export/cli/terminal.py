"""Consoles that fit what they print to where it goes: a terminal, a pipe, and a log file."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Console
from rich.control import Control
from rich.table import Table
from rich.text import Text

from edkm_export.activity import Activity, activity
from edkm_export.cli.table_layout import boxed, plain_lines, stacked_lines, wrapped
from edkm_export.escaping import for_terminal
from edkm_export.plain_data import printable

if TYPE_CHECKING:
    from edkm_export.cli.display import Display

__all__ = ["PRINTED", "Terminal"]

PRINTED = logging.getLogger("edkm_export.printed")
PRINTED.addHandler(logging.NullHandler())  # without a log file, nothing is printed twice
"""What was printed, for the log file."""

_LOGGED_WIDTH = 1000


class Terminal(Console):
    """A console that prints text as it is: no markup, no emoji, no line breaks in a pipe.

    Args:
        stderr: write to standard error.

    Attributes:
        display: of the command that runs, which makes room while something is printed; None: there is none.
        quiet: print nothing, but log it.
    """

    display: ClassVar[Display | None] = None

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    @property
    def moves(self) -> bool:
        """Whether this is a terminal that can draw over its lines."""
        return self.is_terminal and not self.is_dumb_terminal

    def on_broken_pipe(self) -> None:
        """Leave it to the command line, which ends quietly: the reader of the pipe, such as head, has enough."""
        raise BrokenPipeError

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does; tables so that they fit, and sentences broken between words, in a terminal alone.

        What a terminal would act on is written out: names and paths are those of strangers.
        """
        if len(objects) == 1 and isinstance(objects[0], Control):  # what rich moves the cursor with
            super().print(*objects, **options)
            return
        objects = tuple(map(_harmless, objects))
        self._record(objects)
        if self.quiet:
            return
        if self.display is not None:
            self.display.spoke()
        with self._room():
            if len(objects) == 1 and isinstance(objects[0], Table):
                self._print_table(objects[0])
            elif len(objects) == 1 and isinstance(objects[0], str) and "soft_wrap" not in options:
                width = self.width if self.moves else None
                for line in objects[0].split("\n"):
                    indent = " " * (len(line) - len(line.lstrip()))
                    for part in wrapped(line, width, indent) if line.strip() else [line]:
                        super().print(part, soft_wrap=True, **options)
            else:
                super().print(*objects, **options)

    def print_command(self, words: str, command: str) -> None:
        """Print a command that can be pasted, never broken, after some words about it."""
        self.print(f"{words} {command}" if words else command, soft_wrap=True)

    def status(self, status: Any, **_: Any) -> AbstractContextManager[Activity]:  # type: ignore[override]
        """Say what is done meanwhile; see `edkm_export.activity`."""
        return activity(str(status))

    def _print_table(self, table: Table) -> None:
        fits = boxed(table, self) if self.moves else None
        if fits is not None:
            super().print(fits)
            return
        for line in stacked_lines(table, self.width) if self.moves else plain_lines(table):
            super().print(line, soft_wrap=True)

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        # The display lies on standard error and makes room by itself for what is printed there.
        if self.display is None or self.stderr:
            yield
            return
        with self.display.suspended():
            yield

    def _record(self, objects: tuple[Any, ...]) -> None:
        if not PRINTED.isEnabledFor(logging.INFO):
            return
        for each in objects:
            if isinstance(each, Table):
                lines = [line.plain for line in plain_lines(each)]
            elif isinstance(each, str | Text):
                lines = str(each).split("\n")
            else:
                plain = Console(file=io.StringIO(), width=_LOGGED_WIDTH, color_system=None)
                plain.print(each)
                lines = plain.file.getvalue().splitlines()  # type: ignore[attr-defined]
            for line in lines:
                PRINTED.info("%s", printable(line))


def _harmless(printed: Any) -> Any:
    """The same text, text with styles or table, without characters that a terminal acts on."""
    if isinstance(printed, str):
        return for_terminal(printed)
    if isinstance(printed, Text):
        plain = for_terminal(printed.plain)
        return printed if plain == printed.plain else Text(plain, style=printed.style)
    if isinstance(printed, Table):
        printed.title = _harmless(printed.title)
        for column in printed.columns:
            column.header = _harmless(column.header)
            column._cells = [_harmless(cell) for cell in column._cells]
    return printed
