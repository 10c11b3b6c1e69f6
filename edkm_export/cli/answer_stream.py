"""Generated text on standard output, as it comes, with a sign of life while a token is long in coming."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import click
from rich.cells import cell_len

from edkm_export.cli.console import err, out
from edkm_export.cli.terminal import PRINTED, Terminal
from edkm_export.detokenize import TextStream
from edkm_export.escaping import for_terminal
from edkm_export.stop_texts import StopTexts

__all__ = ["AnswerStream"]

_SLOW_S = 1.0
_SAVE, _RESTORE, _ERASE = "\x1b7", "\x1b8", "\x1b[K"  # place of the cursor, and the rest of its line


class AnswerStream:
    """Turns tokens into text, up to a stop text, and prints it.

    Args:
        tokenizer: of transformers.
        prompt: tokens before the generated ones.
        stops: texts that end it.

    Attributes:
        text: what was printed.
        tokens: how many there are.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._detokenized, self._stops = TextStream(tokenizer, prompt), StopTexts(stops)
        self.text, self.tokens = "", 0
        self._shares_terminal = out.moves and err.moves and not err.quiet
        self._lock, self._over = threading.Lock(), threading.Event()
        self._since, self._waits = time.monotonic(), False
        self._stack = contextlib.ExitStack()

    @property
    def stop(self) -> str | None:
        """The stop text that was found."""
        return self._stops.found

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Print what is pushed meanwhile, and end its line."""
        with self._stack:
            try:
                yield
            except BaseException:
                if self.text:  # the message begins on a line of its own
                    self._write("\n")
                raise
            self._write(self._stops.push(self._detokenized.finish()) + self._stops.finish() + "\n")
        for line in self.text.rstrip("\n").split("\n"):
            PRINTED.info("%s", line)

    def push(self, token: int) -> bool:
        """Add a token; true when a stop text ends the answer."""
        if not self.tokens and self._shares_terminal and Terminal.display is not None:
            # From now on the text itself moves, and nothing else may write to its line.
            self._stack.enter_context(Terminal.display.suspended())
            thread = threading.Thread(target=self._show_waiting, daemon=True)
            thread.start()
            self._stack.callback(thread.join)
            self._stack.callback(self._over.set)
        self.tokens += 1
        self._write(self._stops.push(self._detokenized.push(token)))
        return self.stop is not None

    def _write(self, text: str) -> None:
        with self._lock:
            self._since = time.monotonic()
            if text:
                # a pipe takes what the model wrote; on a terminal it must not act
                shown = for_terminal(text) if out.is_terminal else text
                click.echo(_ERASE + shown if self._waits else shown, nl=False)
                self._waits = False
                self.text += text

    def _show_waiting(self) -> None:
        """Behind the text, where the line has room: how many tokens there are, and how long the next one takes."""
        while not self._over.wait(0.25):
            with self._lock:
                seconds = time.monotonic() - self._since
                if seconds < _SLOW_S or self._over.is_set():
                    continue
                words = f" [{self.tokens} tokens, waiting {seconds:.0f} s]"
                column = cell_len(self.text.rpartition("\n")[2]) % max(1, out.width)
                if column + len(words) < out.width:
                    click.echo(f"{_SAVE}{words}{_ERASE}{_RESTORE}", nl=False)
                    self._waits = True
