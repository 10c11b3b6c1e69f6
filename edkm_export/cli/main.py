"""Entry point: the command group, and how errors reach the user."""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import importlib
import io
import os
import sys
from typing import NoReturn

import click

from edkm_export._version import __version__
from edkm_export.cli.mistakes import our_mistake
from edkm_export.disk_space import explain, is_disk_full
from edkm_export.errors import EdkmExportError
from edkm_export.escaping import for_terminal
from edkm_export.interrupts import check_interrupt, watching_signals
from edkm_export.limits import is_out_of_files, is_out_of_memory
from edkm_export.mapped_files import check_mapped_files

__all__ = ["cli", "main"]

_COMMANDS = {
    "palettize": "Cluster a model's weights into lookup tables, in one shot.",
    "train": "Fine-tune a model while its weights are clustered (eDKM).",
    "import": "Make a checkpoint of a model that another tool palettized.",
    "coreml": "Convert a palettized checkpoint to Core ML and verify the result.",
    "onnx": "Convert a palettized checkpoint to ONNX and verify the result.",
    "coreai": "Convert a palettized checkpoint to Core AI and verify the result.",
    "verify": "Check that a package computes what its checkpoint does.",
    "push": "Upload an exported model, with its card and report, to a hub.",
    "compare": "Put several checkpoints and artifacts side by side.",
    "generate": "Let a checkpoint or an exported model write text.",
    "inspect": "Show what is inside a source, a checkpoint or an exported model.",
    "run": "Run any Core ML package on arrays or images.",
    "doctor": "Show what this machine can do, and what a model would take on it.",
}


_ANSWERS = frozenset({"compare", "doctor", "generate", "inspect"})
"""Commands whose standard output is what the user wants; the others make files, and tell of them."""


class _ReaderLeft(Exception):
    """The reader of a pipe, such as head, has left; click would call that a failure."""


_MODULES = {
    "import": "import_",
    "run": "run_package",
}  # a keyword cannot name a module, and a run is one of training


class _LazyGroup(click.Group):
    """Imports a command's module when it is called: `--help` must not wait for torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        from edkm_export.cli.common_options import CommonCommand

        command: click.Command = importlib.import_module(
            f"edkm_export.cli.{_MODULES.get(cmd_name, cmd_name)}"
        ).command
        return CommonCommand(command, answers=cmd_name in _ANSWERS)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise _ReaderLeft from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edkm-export")
def cli() -> None:
    """Take a PyTorch language model to a phone at 2-4 bits a weight, exactly and provably.

    \b
    edkm-export palettize MODEL --calibration TEXT -o model.pt
    edkm-export coreml model.pt
    """  # noqa: D301


def main() -> NoReturn:
    """Run the command line.

    Exit status: 0 success, 1 verification failed, 2 a mistake that the user can mend, 70 one of ours, 130 interrupted.
    """
    atexit.register(
        gc.freeze
    )  # else Python looks through all that torch has imported before it ends: a second
    try:
        with watching_signals():
            status = _run()
    except (
        BaseException
    ) as error:  # of libraries in Rust, some are no Exception; and none may end with Python's 1
        status = _explained(error)
    sys.exit(status)


def _run() -> int:
    """The command; its exit status is 0, or that of the `click.exceptions.Exit` that it raised."""
    try:
        status = cli(standalone_mode=False)
        check_interrupt()  # one that a library swallowed
        sys.stdout.flush()
    except Exception as error:
        check_interrupt()  # an error after a swallowed signal, or of zeros that were read, is not one
        check_mapped_files(look=getattr(error, "errno", None) == errno.EFAULT)
        raise
    return status if isinstance(status, int) else 0


def _explained(error: BaseException) -> int:
    """Say in one line how a command ended; its exit status."""
    if isinstance(error, click.ClickException):
        shown = io.StringIO()
        error.show(shown)
        click.echo(for_terminal(shown.getvalue()), nl=False, err=True)
        return error.exit_code
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return _say("interrupted; nothing was left behind.", 130)
    if isinstance(error, EdkmExportError):
        return _say(str(error), 2)
    if isinstance(error, (BrokenPipeError, _ReaderLeft)):
        _close_output()
        return 0
    _close_output()
    if is_out_of_memory(error):
        return _say(
            "out of memory; use a machine with more, raise its limit (ulimit -v), or a smaller --tokens.", 2
        )
    if is_out_of_files(error):
        return _say("too many open files; raise the limit with `ulimit -n 1024`.", 2)
    if isinstance(error, OSError):
        return _say(explain(error), 2)
    if is_disk_full(error):
        return _say(
            "no space left on the device that was written to, or a quota is reached. Free some space.", 2
        )
    return _say(our_mistake(error), 70)


def _close_output() -> None:
    """Let nothing that could not be written be tried again when Python ends."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        return
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(message: str, status: int) -> int:
    with contextlib.suppress(OSError, ValueError):  # nobody can read it; the status still tells
        click.echo(f"edkm-export: {for_terminal(message)}", err=True)
    return status
