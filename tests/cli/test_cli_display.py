"""Rows that move in a terminal, lines in a pipe, and tables that lose nothing."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import time

import pytest
from rich.table import Table
from rich.text import Text

from edkm_export.activity import Activity, activity, tracked, watched_by
from edkm_export.cli import display as display_module
from edkm_export.cli.console import stages
from edkm_export.cli.display import Display, figure
from edkm_export.cli.pulse import duration
from edkm_export.cli.table_layout import plain_lines, stacked_lines, wrapped
from edkm_export.cli.terminal import Terminal

COMMAND = "`edkm-export coreml 'my model.pt' --interface neural-engine --target iOS18 -o 'a folder'`"
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


class Screen(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def terminal(width: int, monkeypatch, kind: str = "xterm-256color") -> tuple[Terminal, Screen]:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setenv("COLUMNS", str(width))
    console, screen = Terminal(), Screen()
    console.file = screen
    return console, screen


def example() -> Table:
    table = Table(title="findings", title_justify="left")
    for heading in ("finding", "verdict", "remedy"):
        table.add_column(heading)
    table.add_row(
        "model.layers.0.self_attn.q_proj.weight, as it was read",
        Text("FAIL", style="red"),
        f"use {COMMAND} now",
    )
    table.add_row("[a name] in brackets :smile:", Text("PASS"), "nothing")
    return table


@pytest.mark.parametrize("width", [40, 80, 100, 120, 200])
def test_table_loses_nothing_at_any_width(monkeypatch, width):
    console, screen = terminal(width, monkeypatch)
    console.print(example())
    shown = CONTROL.sub("", screen.getvalue())
    assert COMMAND in shown, "a command is never broken"
    flat = " ".join(re.sub(r"[│┃┌┐└┘├┤┏┓┗┛━─┡┩╇┳]", " ", shown).split())
    for word in ("findings", "[a name]", ":smile:", "q_proj.weight,", "FAIL", "PASS", "nothing"):
        assert word in flat
    too_long = [line for line in shown.splitlines() if len(line) > width and COMMAND not in line]
    assert not too_long


def test_table_is_plain_in_a_pipe(monkeypatch):
    console = Terminal()
    console.file = io.StringIO()
    console.print(example())
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "findings" and lines[1].split() == ["finding", "verdict", "remedy"]
    assert len(lines) == 4 and lines[2].endswith(f"use {COMMAND} now")
    assert not re.search(r"[│┃─━\x1b]", "".join(lines))


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("NO_COLOR", "1")])
def test_terminal_that_wants_no_colour(monkeypatch, name, value):
    _, screen = terminal(200, monkeypatch)
    monkeypatch.setenv(name, value)
    plain = Terminal()
    plain.file = screen
    plain.print(example())
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", screen.getvalue())
    if name == "TERM":
        assert "\x1b" not in screen.getvalue() and "━" not in screen.getvalue()


def test_markup_and_emoji_are_text(monkeypatch):
    console, screen = terminal(80, monkeypatch)
    console.print("[bold]folder[/bold]/:smile:/model[1].pt")
    assert screen.getvalue() == "[bold]folder[/bold]/:smile:/model[1].pt\n"


def test_sentences_are_broken_between_words_but_not_in_commands():
    text = f"There is something to be done about this model, which is to run {COMMAND} and then to look at it again."
    lines = wrapped(text, 60, "  ")
    assert " ".join(line.strip() for line in lines) == text
    assert any(COMMAND in line for line in lines)
    assert all(len(line) <= 60 or COMMAND in line for line in lines)
    assert wrapped(text, None) == [text]


def test_stacked_and_plain_hold_all_cells():
    for lines in (stacked_lines(example(), 60), plain_lines(example())):
        text = " ".join(" ".join(line.plain for line in lines).split())
        assert all(cell in text for cell in ("FAIL", "PASS", COMMAND, "nothing"))


# Activities


@pytest.mark.parametrize(
    ("total", "done", "unit", "expected", "short"),
    [
        (None, 0, "", "", ""),
        (None, 12, "sizes", "12 sizes", "12 sizes"),
        (1.0, 0.25, "", "25%", "25%"),
        (8, 3, "stages", "38% (3 of 8 stages)", "38% 3/8 stages"),
        (8, 11, "stages", "100% (8 of 8 stages)", "100% 8/8 stages"),
        (8, -1, "stages", "0% (0 of 8 stages)", "0% 0/8 stages"),
        (2e6, 5e5, "bytes", "25% (0.5 of 2.0 MB)", "25% 0.5/2.0 MB"),
        (12000, 1500, "tokens", "12% (1,500 of 12,000 tokens)", "12% 1,500/12,000 tokens"),
    ],
)
def test_figure(total, done, unit, expected, short):
    counted = Activity("x", total, unit, done=done)
    assert figure(counted) == expected and figure(counted, short=True) == short


@pytest.mark.parametrize(("seconds", "words"), [(0.9, "0 s"), (61, "1 min 1 s"), (7260, "2 h 1 min")])
def test_duration(seconds, words):
    assert duration(seconds) == words


def test_stages_count_from_none_to_all(monkeypatch):
    seen = []

    class Watch:
        def began(self, activity: Activity) -> None:
            self.stage = activity

        def renamed(self, activity: Activity) -> None:
            seen.append((activity.words, figure(activity, short=True)))

        def ended(self, activity: Activity) -> None:
            pass

    with watched_by(Watch()), stages(2) as advance:
        for name in ("first", "second", "third"):  # one more than was promised
            advance(name)
    assert seen == [("first", "0% 0/2 stages"), ("second", "50% 1/2 stages"), ("third", "100% 2/2 stages")]


def test_lines_in_a_pipe_come_regularly(monkeypatch):
    monkeypatch.setattr(display_module, "_PLAIN_EVERY_S", 0.0)
    console = Terminal(stderr=True)
    console.file = io.StringIO()
    display = Display(console, moving=False, log=lambda _words: None)
    with display.shown(), watched_by(display), activity("edkm-export verify"), stages(4) as advance:
        advance("running the original")
        for _ in tracked(range(2), "evaluation text", "windows"):
            seen = len(console.file.getvalue().splitlines())
            deadline = time.monotonic() + 60
            while len(console.file.getvalue().splitlines()) == seen:  # the timer speaks while nothing moves
                assert time.monotonic() < deadline
                time.sleep(0.01)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "- running the original"
    assert re.fullmatch(
        r"- running the original: 0% \(0 of 4 stages\); evaluation text: 0% \(0 of 2 windows\), \d+ s so far",
        lines[1],
    )
    assert any("50% (1 of 2 windows)" in line for line in lines) and "\x1b" not in "".join(lines)


HOLDING = """
import ctypes, os, sys
from edkm_export.activity import activity, watched_by
from edkm_export.cli import display
display._PLAIN_EVERY_S = 0.3
from edkm_export.cli.terminal import Terminal
console = Terminal(stderr=True)
shown = display.Display(console, moving=console.moves, log=lambda words: None)
with shown.shown(), watched_by(shown), activity("edkm-export coreai"):
    with activity("writing model.aimodel", holds_interpreter=True):
        os.write(2, b"<")
        ctypes.PyDLL(None).sleep(2)
        os.write(2, b">")
"""


@pytest.mark.parametrize("moving", [True, False], ids=["terminal", "pipe"])
def test_signs_of_life_while_native_code_holds_the_interpreter(moving):
    reader, writer = pty.openpty() if moving else os.pipe()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"}
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        environment.pop(name, None)
    process = subprocess.Popen([sys.executable, "-c", HOLDING], stderr=writer, env=environment)
    os.close(writer)
    printed = b""
    with contextlib.suppress(OSError):  # how a pseudo-terminal ends
        while part := os.read(reader, 1 << 16):
            printed += part
    os.close(reader)
    assert process.wait() == 0
    during = printed.decode().partition("<")[2].partition(">")[0]
    signs = re.findall(
        r"writing model.aimodel {2}\d s" if moving else "- writing model.aimodel, [01] s so far\n", during
    )
    assert len(signs) >= 2 and ("\x1b" in during) == moving


def test_rows_fit_the_terminal(monkeypatch):
    console, screen = terminal(80, monkeypatch)
    display = Display(console, moving=True, log=lambda _words: None)
    with (
        watched_by(display),
        activity("edkm-export verify"),
        activity("a long name " * 20, 3, "windows") as counted,
    ):
        counted.advance()
        console.print(display._render())
    rows = [line for line in CONTROL.sub("", screen.getvalue()).splitlines() if line.strip()]
    assert len(rows) == 1 and len(rows[0]) <= 80
    assert "…" in rows[0] and "33% 1/3 windows" in rows[0] and rows[0].rstrip().endswith("s")


def test_abandoned_loop_does_not_take_others_along():
    display = Display(Terminal(stderr=True), moving=False, log=lambda _words: None)
    outer, loop, later = Activity("outer"), Activity("loop"), Activity("later")
    for each in (outer, loop):
        display.began(each)
    display.ended(loop)
    display.began(later)
    display.ended(loop)  # collected late
    assert display._stack == [outer, later]


def in_terminal(
    *arguments: object, environment: dict[str, str], program: tuple[str, str] = ("-m", "edkm_export")
) -> tuple[int, str]:
    """Status and output of a command that runs in a pseudo-terminal of 80 columns."""
    reader, writer = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=writer,
        env={**os.environ, "COLUMNS": "80", "LINES": "40", "OMP_NUM_THREADS": "1", **environment},
    )
    os.close(writer)
    parts = []
    while True:
        try:
            data = os.read(reader, 1 << 16)
        except OSError:  # how a pseudo-terminal ends
            break
        if not data:
            break
        parts.append(data)
    os.close(reader)
    return process.wait(120), b"".join(parts).decode()


SLOW_TORCH = """
import sys, time
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def slowly(name, *rest):
    if name == "torch":
        time.sleep(2.5)
    return find(name, *rest)
PathFinder.find_spec = staticmethod(slowly)
from edkm_export.cli.main import main
main()
"""


@pytest.mark.parametrize("kind", ["xterm-256color", "dumb"])
def test_in_a_real_terminal(saved, kind):
    """The import of torch takes long here, however fast the machine is: a row is shown after a second."""
    status, text = in_terminal("inspect", saved, environment={"TERM": kind}, program=("-c", SLOW_TORCH))
    assert status == 0
    if kind == "dumb":
        assert "\x1b" not in text
        return
    assert "edkm-export inspect" in text  # the row that moves while torch is imported
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") > 0  # the cursor is there again
    assert f"{saved}: checkpoint" in text.replace("\r\n", "")
