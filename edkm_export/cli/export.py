"""What every export does, whatever its format: plan, write, verify, print."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from edkm_export.cli.parameter_types import CHECKPOINT
from edkm_export.cli.verification import climb, prepare, verification_options

if TYPE_CHECKING:  # importing these takes torch, which `--help` must not wait for
    from edkm_export.checkpoint import Checkpoint
    from edkm_export.model_card import FormatCard

__all__ = ["Exporter", "export_arguments", "export_options", "run_export"]

_F = TypeVar("_F", bound=Callable[..., Any])
_Plan = TypeVar("_Plan", bound="Plan")


class Plan(Protocol):
    """What an export will make."""

    @property
    def weights_size_bytes(self) -> int:
        """Predicted size of all weights on disk."""


class Exporter(Protocol[_Plan]):
    """What a format does in each of them."""

    @property
    def suffix(self) -> str:
        """Of the folder that is made when none is named: MODEL-`suffix`."""

    def plan(self, checkpoint: Checkpoint) -> _Plan:
        """Check that a checkpoint can be exported, before the long work."""

    def show(self, checkpoint: Checkpoint, plan: _Plan, name: str) -> None:
        """Print what `--dry-run` promises."""

    def warn(self, checkpoint: Checkpoint, plan: _Plan) -> None:
        """Print what the user should know before the long work."""

    def write(self, checkpoint: Checkpoint, plan: _Plan, folder: Path, name: str) -> Path:
        """Write everything but the report into an empty folder; the artifact in it that is to be verified."""

    def card(self, checkpoint: Checkpoint, plan: _Plan, name: str) -> FormatCard:
        """What the model card says of the format."""

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
        SystemExit: status 1 when it was made, but is not proved faithful, or its quality is beyond the limit.
    """
    from edkm_export.atomic import atomic_folder, check_output
    from edkm_export.text import check_text

    check_text(verification["text"])

    from edkm_export.checkpoint import load
    from edkm_export.cli.cards import verification_words
    from edkm_export.cli.common_options import answering, is_quiet
    from edkm_export.cli.console import err, megabytes, out, print_report, summary_line
    from edkm_export.command_line import command_line
    from edkm_export.disk_space import require_space
    from edkm_export.model_card import FILE, model_card
    from edkm_export.verify.write import write_report

    folder = output or path.with_name(f"{path.stem}-{exporter.suffix}")
    if not dry_run:
        check_output(folder, overwrite=overwrite, folder=True)
    with err.status(f"reading {path}"):
        checkpoint = load(path)
    with err.status("planning"):
        plan = exporter.plan(checkpoint)
    if dry_run:
        with answering():
            exporter.show(checkpoint, plan, path.stem)
        return
    require_space(folder, plan.weights_size_bytes)
    inputs = None if no_verify else prepare(checkpoint, **verification)
    exporter.warn(checkpoint, plan)
    report = None
    needed = plan.weights_size_bytes
    with atomic_folder(folder, overwrite=overwrite, needed_bytes=needed) as temporary:
        with err.status(f"converting {len(checkpoint.palettized)} palettized weights"):
            artifact = exporter.write(checkpoint, plan, temporary, path.stem)
        if inputs is not None:
            report = climb(checkpoint, artifact, inputs, plan.weights_size_bytes)
            if artifact == temporary:
                report = report.model_copy(
                    update={"artifact": folder.absolute().name}
                )  # as it will be called
            write_report(report, temporary)
        card = model_card(
            checkpoint, path.stem, exporter.card(checkpoint, plan, path.stem), *verification_words(report)
        )
        (temporary / FILE).write_text(card, encoding="utf-8")
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
        sys.exit(1)
    out.print_command("share it with:", command_line("push", folder, "OWNER/NAME"))
