"""What every export does, whatever its format: plan, write, verify, print."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from edkm_export.api.climbing import climb
from edkm_export.api.formats import Format, Plan, write_folder
from edkm_export.cli.parameter_types import CHECKPOINT
from edkm_export.cli.verification import prepare, verification_options

if TYPE_CHECKING:  # importing these takes torch, which `--help` must not wait for
    from edkm_export.checkpoint import Checkpoint

__all__ = ["Exporter", "cache_row", "export_arguments", "export_options", "kv_cache_option", "run_export"]

_F = TypeVar("_F", bound=Callable[..., Any])
_Plan = TypeVar("_Plan", bound=Plan)


class Exporter(Format[_Plan], Protocol[_Plan]):
    """What a format does in its command."""

    @property
    def suffix(self) -> str:
        """Of the folder that is made when none is named: MODEL-`suffix`."""

    def show(self, checkpoint: Checkpoint, plan: _Plan, name: str) -> None:
        """Print what `--dry-run` promises."""

    def warn(self, checkpoint: Checkpoint, plan: _Plan) -> None:
        """Print what the user should know before the long work."""

    def next_commands(self, plan: _Plan, folder: Path, checkpoint: Path) -> list[str]:
        """What the user can do with the folder that was made of a model.pt, a line each."""


def export_arguments(function: _F) -> _F:
    """Add MODEL.PT and --output to a command, before the options of its format."""
    function = click.option(
        "-o", "--output", type=click.Path(path_type=Path), help="Folder to make.  [default: MODEL-FORMAT]"
    )(function)
    return click.argument("checkpoint", metavar="MODEL.PT", type=CHECKPOINT)(function)


def export_options(function: _F) -> _F:
    """Add --dry-run, --no-verify, the options of the verification and --overwrite after those of its format."""
    for option in (
        click.option("--overwrite", is_flag=True, help="Replace an existing output."),
        verification_options,
        click.option("--no-verify", is_flag=True, help="Do not verify; the folder then holds no report."),
        click.option("--dry-run", is_flag=True, help="Show the plan and its sizes; write nothing."),
    ):
        function = option(function)
    return function


def kv_cache_option(words: str) -> Callable[[_F], _F]:
    """Add --kv-cache to a command.

    Args:
        words: what becomes of int8 in its format.
    """
    return click.option(
        "--kv-cache",
        type=click.Choice(["float", "int8"]),
        default="float",
        show_default=True,
        help=f"How keys and values are held. int8: a scale for each head and token. {words}",
    )


def cache_row(kv_cache: str, bytes_per_token: int, context: int) -> str:
    """What keys and values take, for a plan."""
    from edkm_export.cli.console import megabytes

    whole = megabytes(bytes_per_token * context)
    return f"{kv_cache}, {bytes_per_token:,} bytes a token, {whole} at {context:,} positions"


def run_export(
    exporter: Exporter[Any],
    path: Path,
    output: Path | None,
    *,
    dry_run: bool,
    no_verify: bool,
    overwrite: bool,
    **verification: Any,
) -> None:
    """Export a checkpoint, and verify what lies on disk.

    Args:
        exporter: of the format.
        path: the model.pt.
        output: folder to make; None: beside it.
        dry_run: only show the plan.
        no_verify: leave the verification out.
        overwrite: replace an existing folder.
        verification: see `verification.prepare`.

    Raises:
        click.exceptions.Exit: status 1, when it was made, but is not proved faithful, or its quality is beyond the
            limit.
    """
    from edkm_export.atomic import check_output
    from edkm_export.text import check_text

    check_text(verification["text"])

    from edkm_export.checkpoint import load
    from edkm_export.cli.common_options import answering, is_quiet
    from edkm_export.cli.console import err, megabytes, out, print_report, summary_line
    from edkm_export.command_line import command_line
    from edkm_export.disk_space import require_space

    folder = output or path.with_name(f"{path.stem}-{exporter.suffix}")
    if not dry_run:
        check_output(folder, overwrite=overwrite, folder=True)
    with err.status(f"reading {path}"):
        checkpoint = load(path)
    if checkpoint.weakness:
        err.print(f"- {checkpoint.weakness}", markup=False, soft_wrap=True)
    with err.status("planning"):
        plan = exporter.plan(checkpoint)
    if dry_run:
        with answering():
            exporter.show(checkpoint, plan, path.stem)
        return
    require_space(folder, plan.weights_size_bytes)
    inputs = None if no_verify else prepare(checkpoint, **verification)
    exporter.warn(checkpoint, plan)
    report = write_folder(
        exporter,
        checkpoint,
        plan,
        folder,
        path.stem,
        overwrite=overwrite,
        judge=None
        if inputs is None
        else lambda artifact: climb(checkpoint, artifact, inputs, plan.weights_size_bytes),
    )
    if report is None:
        size = megabytes(plan.weights_size_bytes)
        out.print(f"{folder}: {size} of weights, NOT VERIFIED (--no-verify)", soft_wrap=True)
        out.print_command("verify it with:", command_line("verify", path, folder))
        return
    if is_quiet():
        with answering():
            out.print(summary_line(report), soft_wrap=True)
    else:
        print_report(report)
    for line in exporter.next_commands(plan, folder, path):
        out.print(line, soft_wrap=True)
    if report.failed:
        raise click.exceptions.Exit(1)
    out.print_command("share it with:", command_line("push", folder, "OWNER/NAME"))
