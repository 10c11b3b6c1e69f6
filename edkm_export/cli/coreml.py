"""edkm-export coreml: a palettized checkpoint becomes a verified Core ML package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from edkm_export.cli.verification import climb, prepare, verification_options

__all__ = ["command"]


@click.command("coreml", short_help="Convert a palettized checkpoint to Core ML and verify the result.")
@click.argument("checkpoint", metavar="MODEL.PT", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder to make.  [default: MODEL-coreml]"
)
@click.option(
    "--target", default="iOS18", show_default=True, help="Oldest system to run on: iOS16, iOS17 or iOS18."
)
@click.option(
    "--sequence-length", type=int, help="Tokens of the input.  [default: 512, or what the model can]"
)
@click.option("--no-verify", is_flag=True, help="Do not verify; the folder then holds no report.")
@verification_options
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
def command(
    checkpoint: Path,
    output: Path | None,
    target: str,
    sequence_length: int | None,
    no_verify: bool,
    overwrite: bool,
    **verification: Any,
) -> None:
    """Convert MODEL.PT to a Core ML package, bit for bit, and verify the files on disk.

    The folder holds the .mlpackage, the tokenizer and the verification report. Exit status 1: it was made, but
    failed verification.
    """
    from converters.coreml.bundle import write_bundle
    from converters.coreml.language_model import plan_logits
    from edkm_export.atomic import atomic_folder, check_output
    from edkm_export.checkpoint import load
    from edkm_export.cli.console import err, ladder_table, megabytes, out, summary_table
    from edkm_export.verify.report import Verdict
    from edkm_export.verify.write import write_report

    folder = output or checkpoint.with_name(f"{checkpoint.stem}-coreml")
    check_output(folder, overwrite=overwrite, folder=True)
    with err.status(f"reading {checkpoint}"):
        loaded = load(checkpoint)
    evaluation = None if no_verify else prepare(loaded, **verification)
    plan = plan_logits(loaded, target=target, sequence_length=sequence_length)
    report = None
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        with err.status(f"converting {len(loaded.palettized)} palettized weights to Core ML"):
            package = write_bundle(loaded, plan, temporary, checkpoint.stem)
        if evaluation is not None:
            report = climb(loaded, package, evaluation, plan.weights_size_bytes)
            write_report(report, temporary)
    if report is None:
        out.print(
            f"{folder}: {megabytes(plan.weights_size_bytes)} of weights, NOT VERIFIED (--no-verify)",
            soft_wrap=True,
        )
        out.print(f"verify it with: edkm-export verify {checkpoint} {folder}", soft_wrap=True)
        return
    out.print(summary_table(report))
    out.print(ladder_table(report))
    out.print(
        f"{folder}: drag {package.name} into Xcode; report.md says what was proved and what was not.",
        soft_wrap=True,
    )
    if report.verdict is Verdict.FAIL:
        sys.exit(1)
