"""edkm-export coreml: a palettized checkpoint becomes a verified Core ML package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from edkm_export.cli.verification import climb, prepare, verification_options

if TYPE_CHECKING:  # importing these takes torch, which `--help` must not wait for
    from converters.coreml.export_plan import ExportPlan
    from converters.coreml.lint import Finding

__all__ = ["command"]


class _Chunks(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A number of packages, or "auto"."""

    name = "N|auto"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | Literal["auto"]:
        """Read it."""
        if value == "auto":
            return "auto"
        if not (str(value).isdigit() and int(value) > 0):
            self.fail(f"{value!r} is neither a positive number nor 'auto'.", param, ctx)
        return int(value)


@click.command("coreml", short_help="Convert a palettized checkpoint to Core ML and verify the result.")
@click.argument("checkpoint", metavar="MODEL.PT", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder to make.  [default: MODEL-coreml]"
)
@click.option(
    "--interface",
    default="swift-transformers",
    show_default=True,
    help="How an app calls it: swift-transformers (cache, any length), neural-engine (cache, static prefill and "
    "decode functions) or logits (whole texts, no cache).",
)
@click.option(
    "--target", default="iOS18", show_default=True, help="Oldest system to run on: iOS16, iOS17 or iOS18."
)
@click.option(
    "--sequence-length",
    type=int,
    help="Positions that it can hold.  [default: 2048 with a cache, 512 for logits, or what the model can]",
)
@click.option(
    "--prefill", type=int, default=64, show_default=True, help="Tokens of a prefill call (neural-engine)."
)
@click.option(
    "--chunks",
    type=_Chunks(),
    default="auto",
    show_default=True,
    help="Packages to cut the layers into (neural-engine); auto: as few as stay below 1 GB each.",
)
@click.option("--dry-run", is_flag=True, help="Show plan, sizes and device lint; write nothing.")
@click.option("--no-verify", is_flag=True, help="Do not verify; the folder then holds no report.")
@verification_options
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
def command(
    checkpoint: Path,
    output: Path | None,
    interface: str,
    target: str,
    sequence_length: int | None,
    prefill: int,
    chunks: int | Literal["auto"],
    dry_run: bool,
    no_verify: bool,
    overwrite: bool,
    **verification: Any,
) -> None:
    """Convert MODEL.PT to a Core ML package, bit for bit, and verify the files on disk.

    The folder holds the .mlpackage, the tokenizer, a model card and the verification report. Exit status 1: it was
    made, but failed verification.
    """
    from converters.coreml.bundle import write_bundle
    from converters.coreml.export_plan import plan_export
    from converters.coreml.lint import lint
    from converters.coreml.model_card import mac_steps, model_card
    from edkm_export.atomic import atomic_folder, check_output
    from edkm_export.checkpoint import load
    from edkm_export.cli.console import err, out, print_report, print_unverified
    from edkm_export.verify.report import Verdict
    from edkm_export.verify.write import write_report

    folder = output or checkpoint.with_name(f"{checkpoint.stem}-coreml")
    if not dry_run:
        check_output(folder, overwrite=overwrite, folder=True)
    with err.status(f"reading {checkpoint}"):
        loaded = load(checkpoint)
    with err.status("planning"):
        plan = plan_export(
            loaded,
            interface=interface,
            target=target,
            sequence_length=sequence_length,
            prefill=prefill,
            chunks=chunks,
        )
        findings = lint(loaded, plan)
    if dry_run:
        _show(plan, checkpoint.stem, findings)
        return
    evaluation = None if no_verify else prepare(loaded, **verification)
    _warn(findings)
    report = None
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        with err.status(f"converting {len(loaded.palettized)} palettized weights to Core ML"):
            package = write_bundle(loaded, plan, temporary, checkpoint.stem)
        if evaluation is not None:
            report = climb(loaded, package, evaluation, plan.weights_size_bytes)
            write_report(report, temporary)
        card = model_card(loaded, plan, checkpoint.stem, findings, report)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    if report is None:
        print_unverified(folder, checkpoint, plan.weights_size_bytes)
        return
    print_report(report)
    names = " and ".join(plan.package_names(checkpoint.stem))
    out.print(
        f"{folder}: drag {names} into Xcode; report.md says what was proved and what was not.", soft_wrap=True
    )
    out.print("on a Mac, where this was not run:", soft_wrap=True)
    for step in mac_steps(plan, checkpoint.stem):
        out.print(f"    {step}", soft_wrap=True)
    if report.verdict is Verdict.FAIL:
        sys.exit(1)


def _show(plan: ExportPlan, name: str, findings: list[Finding]) -> None:
    """The plan, the sizes and the lint."""
    from rich.table import Table

    from edkm_export.cli.console import megabytes, out

    table = Table(title="plan (nothing was written)", title_justify="left", show_header=False)
    table.add_row("interface", plan.interface)
    table.add_row("target", plan.target)
    table.add_row("positions", f"{plan.context:,}")
    if plan.prefill:
        table.add_row("functions", f"prefill ({plan.prefill} tokens), decode (1 token)")
    if plan.split is not None:
        table.add_row("vocabulary", f"{plan.split.name} in {len(plan.split.parts)} parts")
    for file, layers, size in zip(
        plan.package_names(name), plan.chunks, plan.package_sizes_bytes, strict=True
    ):
        table.add_row(
            file, f"layers {layers.first} to {layers.end - 1}, {megabytes(size)} of weights ({size:,} bytes)"
        )
    out.print(table)
    if not findings:
        out.print("device lint: nothing found")
        return
    lines = Table(title="device lint", title_justify="left")
    for heading in ("finding", "reason", "remedy", "source"):
        lines.add_column(heading)
    for finding in findings:
        subject = f"{finding.severity}: {finding.id}\n{finding.subject}"
        lines.add_row(subject, finding.reason, finding.remedy, finding.source)
    out.print(lines)


def _warn(findings: list[Finding]) -> None:
    """What is worse than a note, before the long work."""
    from edkm_export.cli.console import err

    for finding in findings:
        if finding.severity != "note":
            err.print(
                f"{finding.severity}: {finding.subject}: {finding.reason} {finding.remedy} ({finding.source})",
                soft_wrap=True,
                highlight=False,
            )
