"""Entry point: the command group, and how errors reach the user."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import NoReturn

import click

from edkm_export._version import __version__
from edkm_export.errors import EdkmExportError
from edkm_export.interrupts import check_interrupt, watching_signals

__all__ = ["cli", "main"]

_COMMANDS = {
    "palettize": "Cluster a model's weights into lookup tables, in one shot.",
    "train": "Fine-tune a model while its weights are clustered (eDKM).",
    "import": "Make a checkpoint of a model that another tool palettized.",
    "coreml": "Convert a palettized checkpoint to Core ML and verify the result.",
    "onnx": "Convert a palettized checkpoint to ONNX and verify the result.",
    "coreai": "Convert a palettized checkpoint to Core AI and verify the result.",
    "verify": "Check that a package computes what its checkpoint does.",
    "compare": "Put several checkpoints and artifacts side by side.",
    "generate": "Let a checkpoint or an exported model write text.",
    "inspect": "Show what is inside a source, a checkpoint or an exported model.",
}


class _ReaderLeft(Exception):
    """The reader of a pipe, such as head, has left; click would call that a failure."""


_MODULES = {"import": "import_"}  # a keyword cannot name a module


class _LazyGroup(click.Group):
    """Imports a command's module when it is called: `--help` must not wait for torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(
            f"edkm_export.cli.{_MODULES.get(cmd_name, cmd_name)}"
        ).command
        return command

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
    """Run; exit status 0 success, 1 verification failed, 2 a mistake that the user can mend, 130 interrupted."""
    try:
        with watching_signals():
            try:
                status = cli(standalone_mode=False)
            except Exception:
                check_interrupt()  # an error after a swallowed signal is not one
                raise
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; nothing was left behind.", 130)
    except EdkmExportError as error:
        _fail(str(error), 2)
    except (BrokenPipeError, _ReaderLeft):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _fail(_explain(error), 2)
    except MemoryError:
        _fail("out of memory; use a machine with more, or a smaller --tokens.", 2)
    sys.exit(status if isinstance(status, int) else 0)


def _explain(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        return (
            f"{where}no space left on the device; nothing was left behind. Free some, or choose another -o."
        )
    return f"{where}{error.strerror or error}"


def _fail(message: str, status: int) -> NoReturn:
    click.echo(f"edkm-export: {message}", err=True)
    sys.exit(status)
