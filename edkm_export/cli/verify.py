"""edkm-export verify: check a package against its checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from edkm_export.cli.verification import climb, prepare, verification_options

__all__ = ["command"]


@click.command("verify", short_help="Check that a package computes what its checkpoint does.")
@click.argument("checkpoint", metavar="MODEL.PT", type=click.Path(path_type=Path))
@click.argument("package", metavar="PACKAGE", type=click.Path(path_type=Path))
@verification_options
@click.option(
    "--report", "report_folder", type=click.Path(path_type=Path), help="Write report.json and report.md here."
)
def command(checkpoint: Path, package: Path, report_folder: Path | None, **verification: Any) -> None:
    """Compare what PACKAGE computes with the PyTorch model of MODEL.PT.

    PACKAGE is an .mlpackage or the folder that `edkm-export coreml` made. Exit status 0: passed, 1: failed.
    """
    from converters.coreml.bundle import find_package
    from edkm_export.checkpoint import load
    from edkm_export.cli.console import err, ladder_table, out, summary_table
    from edkm_export.errors import InputError
    from edkm_export.verify.report import Verdict
    from edkm_export.verify.write import write_report

    found = find_package(package)
    if report_folder is not None:
        try:
            report_folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise InputError(f"{report_folder}: is a file; --report takes a folder.") from error
    with err.status(f"reading {checkpoint}"):
        loaded = load(checkpoint)
    report = climb(loaded, found, prepare(loaded, **verification), _predicted(loaded, found))
    if report_folder is not None:
        write_report(report, report_folder)
    out.print(summary_table(report))
    out.print(ladder_table(report))
    if report_folder is not None:
        out.print(f"report: {report_folder / 'report.md'}", soft_wrap=True)
    if report.verdict is Verdict.FAIL:
        sys.exit(1)


def _predicted(checkpoint: Any, package: Path) -> int | None:
    """What the recipe promises for the package's own sequence length; None when that cannot be read."""
    from converters.coreml import load_package
    from converters.coreml.language_model import plan_logits
    from edkm_export.errors import EdkmExportError
    from edkm_export.verify.executors import sequence_length

    try:
        return plan_logits(
            checkpoint, sequence_length=sequence_length(load_package(package))
        ).weights_size_bytes
    except (EdkmExportError, json.JSONDecodeError):
        return None  # the ladder says what is wrong with the package
