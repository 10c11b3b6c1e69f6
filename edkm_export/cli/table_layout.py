"""Tables that lose nothing: boxed where they fit, stacked where they do not, plain columns in a pipe."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

__all__ = ["boxed", "plain_lines", "stacked_lines", "wrapped"]

_NARROWEST_PROSE = 36  # columns; sentences in a narrower one are hard to read
_WIDEST_PLAIN = 120  # columns before the last one, in a pipe
_BRIEF = 24  # characters; longer cells have lines of their own
_KEPT = "\0"  # stands for a space that is no place to break a line


def boxed(table: Table, console: Console) -> Table | None:
    """The table, if it fits the width of a terminal; its widest column may be wrapped, between words.

    Returns:
        None when something would be cut, or a command be broken.
    """
    natural = Measurement.get(console, console.options.update(max_width=100_000), table).maximum
    if natural <= console.width:
        return table
    columns = [[_plain(cell) for cell in column.cells] for column in table.columns]
    headings = [_plain(column.header) for column in table.columns]
    widths = [max(map(_width, cells), default=0) for cells in columns]
    widest = widths.index(max(widths))
    room = widths[widest] - (natural - console.width)
    if room < _NARROWEST_PROSE or _longest_word([headings[widest], *columns[widest]]) > room:
        return None
    for number, column in enumerate(table.columns):
        column.no_wrap = number != widest
    return table


def plain_lines(table: Table) -> list[Text]:
    """The table in columns without a box, of any width, a line a row; stacked when it holds much prose."""
    rows = [[" ".join(_plain(cell).split()) for cell in row] for row in _rows(table)]
    headings = [[_plain(column.header) for column in table.columns]] if table.show_header else []
    widths = [max(map(cell_len, cells), default=0) for cells in zip(*headings, *rows, strict=True)]
    if sum(widths[:-1]) > _WIDEST_PLAIN:
        return stacked_lines(table, None)
    lines = []
    for row in headings + rows:
        parts = []
        for text, width, column in zip(row, widths, table.columns, strict=True):
            space = " " * (width - cell_len(text))
            parts.append(space + text if column.justify == "right" else text + space)
        lines.append(Text("  ".join(parts).rstrip()))
    return [*_title(table), *lines]


def stacked_lines(table: Table, width: int | None) -> list[Text]:
    """Each row as lines below each other, the first cell as their heading.

    Args:
        table: of any size.
        width: of the lines, as far as words and commands allow; None: any.
    """
    lines = _title(table)
    for row in _rows(table):
        cells = [_plain(cell) for cell in row]
        if not table.show_header:
            words = f"{cells[0]}: {'  '.join(filter(None, cells[1:]))}"
            lines += [Text(line) for line in wrapped(words, width, "    ")]
            continue
        found = wrapped(" ".join(cells[0].split()), width, "    ")
        named = [
            (_plain(column.header), " ".join(text.split()))
            for column, text in zip(table.columns[1:], cells[1:], strict=True)
            if text
        ]
        brief = ", ".join(f"{heading} {text}" for heading, text in named if len(text) <= _BRIEF)
        found += wrapped(f"  {brief}", width, "    ") if brief else []
        for heading, text in named:
            if len(text) > _BRIEF:
                found += wrapped(f"  {heading}: {text}", width, "    ")
        for line in found:
            shown = Text(line)
            for cell in row:
                if isinstance(cell, Text):
                    shown.highlight_words([cell.plain], cell.style)
            lines.append(shown)
    return lines


def wrapped(text: str, width: int | None, indent: str = "") -> list[str]:
    """Break a text between words, but not inside of `commands`, paths or options.

    Args:
        text: without line breaks.
        width: of the lines; a longer word or command has a longer line. None: no break.
        indent: of all lines but the first.
    """
    if width is None:
        return [text]
    kept = re.sub(r"`[^`]*`", lambda found: found[0].replace(" ", _KEPT), text)
    lines = textwrap.wrap(
        kept,
        max(width, _NARROWEST_PROSE),
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )
    return [line.replace(_KEPT, " ") for line in lines] or [""]


def _title(table: Table) -> list[Text]:
    return [Text(_plain(table.title))] if table.title else []


def _rows(table: Table) -> Iterator[Sequence[RenderableType]]:
    return zip(*(list(column.cells) for column in table.columns), strict=True)


def _plain(cell: RenderableType) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)


def _width(cell: str) -> int:
    return max(map(cell_len, cell.splitlines()), default=0)


def _longest_word(cells: Sequence[str]) -> int:
    words = (word for cell in cells for word in re.findall(r"`[^`]*`\S*|\S+", cell))
    return max(map(cell_len, words), default=0)
