"""What every command can do: be quiet, be verbose, and keep a log."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from edkm_export._version import __version__
from edkm_export.activity import activity, watched_by
from edkm_export.cli.console import err, out
from edkm_export.cli.display import Display
from edkm_export.cli.help_sections import UNITS, arrange
from edkm_export.cli.mistakes import in_one_line, loaded_versions
from edkm_export.cli.table_layout import wrapped
from edkm_export.cli.terminal import PRINTED, Terminal
from edkm_export.errors import EdkmExportError, InputError
from edkm_export.escaping import for_terminal

__all__ = ["CommonCommand", "answering", "is_quiet", "is_verbose", "log_path"]

_HELP_WIDTH = 100  # columns; a terminal that is narrower decides
_asked: dict[str, Any] = {"quiet": False, "verbose": False, "log_file": None}


def is_quiet() -> bool:
    """Whether the user asked for results and errors alone."""
    return bool(_asked["quiet"])


def is_verbose() -> bool:
    """Whether the user asked to see everything; true of the last command, too, when it has failed."""
    return bool(_asked["verbose"])


def log_path() -> Path | None:
    """The file that the user named with --log-file; likewise true of the last command."""
    path: Path | None = _asked["log_file"]
    return path


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """What is printed to standard output meanwhile is what the user asked for: --quiet does not hide it."""
    before, out.quiet = out.quiet, False
    try:
        yield
    finally:
        out.quiet = before


class CommonCommand(click.Command):
    """A command that can also be quiet, be verbose and keep a log; its help is arranged under headings.

    Choices are taken in any case, and figures are shown with their units.

    Args:
        command: the command as it is written; it is not changed.
        answers: whether what it prints to standard output is its result, which --quiet leaves.
    """

    def __init__(self, command: click.Command, *, answers: bool) -> None:
        super().__init__(
            command.name,
            callback=_talking(command.callback, command.name or "", answers),
            params=[*map(_described, command.params), *_options()],
            help=command.help,
            epilog=command.epilog,
            short_help=command.short_help,
            context_settings={"max_content_width": _HELP_WIDTH},
        )

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the description, broken between words but not inside of commands."""
        for paragraph in inspect.cleandoc(self.help or "").split("\n\n"):
            formatter.write_paragraph()
            for line in wrapped(" ".join(paragraph.split()), formatter.width - 2):
                formatter.write(f"  {line}\n")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their headings."""
        for heading, lines in arrange(self, ctx):
            with formatter.section(heading):
                formatter.write_dl(lines)


def _options() -> list[click.Parameter]:
    return [
        click.Option(["-q", "--quiet"], is_flag=True, help="Print results and errors alone."),
        click.Option(
            ["-v", "--verbose"],
            is_flag=True,
            help="Also print logs of libraries, versions, times, and where an error of ours comes from.",
        ),
        click.Option(
            ["--log-file"],
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            help="Add everything to this file, as plain text with times.",
        ),
    ]


def _described(parameter: click.Parameter) -> click.Parameter:
    """The parameter with its unit; a choice is taken in any case."""
    described = copy.copy(parameter)
    if isinstance(described.type, click.Choice):
        described.type = click.Choice(described.type.choices, case_sensitive=False)
    if isinstance(described, click.Option) and not described.is_flag and described.metavar is None:
        described.metavar = (
            None if isinstance(described.type, click.Choice) else UNITS.get(described.name or "")
        )
    return described


def _talking(callback: Callable[..., Any] | None, name: str, answers: bool) -> Callable[..., Any]:
    assert callback is not None

    @functools.wraps(callback)
    def run(*arguments: Any, quiet: bool, verbose: bool, log_file: Path | None, **options: Any) -> Any:
        if quiet and verbose:
            raise click.UsageError("--quiet and --verbose contradict each other; give one of them.")
        with _session(name, quiet=quiet, verbose=verbose, log_file=log_file, answers=answers):
            return callback(*arguments, **options)

    return run


@contextlib.contextmanager
def _session(
    name: str, *, quiet: bool, verbose: bool, log_file: Path | None, answers: bool
) -> Iterator[None]:
    """Print, show and log what a command does as the user asked."""
    _asked.update(quiet=quiet, verbose=verbose, log_file=None)
    for stream in (sys.stdout, sys.stderr):  # a terminal without Unicode shows question marks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    is_first = os.environ.get("RANK", "0") == "0"  # torchrun may have started several processes
    silent = quiet or not is_first
    display = Display(err, moving=err.moves and not silent, log=_log_activity)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.callback(_speak, out.quiet, err.quiet)
        out.quiet, err.quiet = (quiet and not answers), silent
        stack.enter_context(_logging(verbose, log_file))
        _asked["log_file"] = log_file
        PRINTED.info("edkm-export %s, Python %s, %s", __version__, platform.python_version(), sys.argv[1:])
        if verbose:
            err.print(f"edkm-export {__version__}, Python {platform.python_version()}, {platform.platform()}")
        if not silent:
            stack.enter_context(_displayed(display))
        try:
            with watched_by(display), activity(f"edkm-export {name}"):
                yield
        except (KeyboardInterrupt, click.exceptions.Exit):
            raise
        except BaseException as error:
            _log_error(error)
            raise
        if verbose:
            err.print(f"versions: {loaded_versions()}")
            err.print(f"{name}: took {time.monotonic() - started:.1f} s")


def _speak(out_quiet: bool, err_quiet: bool) -> None:
    out.quiet, err.quiet = out_quiet, err_quiet


@contextlib.contextmanager
def _displayed(display: Display) -> Iterator[None]:
    with display.shown():
        Terminal.display = display
        try:
            yield
        finally:
            Terminal.display = None


@contextlib.contextmanager
def _logging(verbose: bool, log_file: Path | None) -> Iterator[None]:
    """Send logs and warnings of libraries to the terminal, the file, or both.

    Raises:
        InputError: the file cannot be written.
    """
    if not verbose and log_file is None:
        yield
        return
    handlers: list[logging.Handler] = []
    if verbose:
        handlers.append(_ToTerminal())
    if log_file is not None:
        try:
            handlers.append(_ToFile(log_file, encoding="utf-8", errors="backslashreplace"))
        except OSError as error:
            raise InputError(f"--log-file {log_file}: {error.strerror}; choose another file.") from error
        handlers[-1].setFormatter(_Harmless("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


class _Harmless(logging.Formatter):
    """Without characters that a terminal acts on, should somebody read the file there."""

    def format(self, record: logging.LogRecord) -> str:
        return for_terminal(super().format(record))


class _ToFile(logging.FileHandler):
    """Writes the log as long as that is possible; a full disk does not end the command, and is told once."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:  # the name is Python's
        if not self.told:
            self.told = True
            err.print(f"--log-file {self.baseFilename}: {sys.exc_info()[1]}; the log is not complete")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class _ToTerminal(logging.Handler):
    """Prints what libraries log, and how long activities took."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != PRINTED.name:
            err.print(f"{record.name}: {record.getMessage()}", soft_wrap=True)


def _log_activity(words: str) -> None:
    logging.getLogger("edkm_export.activity").info("%s", words)


def _log_error(error: BaseException) -> None:
    if isinstance(error, EdkmExportError | click.ClickException | OSError):
        PRINTED.error("%s", getattr(error, "message", None) or error)
    else:
        PRINTED.error("%s", in_one_line(error), exc_info=error)
