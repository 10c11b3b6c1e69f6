"""edkm-export verify: check a package against its checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from edkm_export.cli.artifacts import find_artifact
from edkm_export.cli.verification import climb, prepare, verification_options

__all__ = ["command"]


@click.command("verify", short_help="Check that a package computes what its checkpoint does.")
@click.argument("checkpoint", metavar="MODEL.PT", type=click.Path(path_type=Path))
@click.argument("package", metavar="PACKAGE", type=click.Path(path_type=Path))
@verification_options
@click.option(
    "--report",
    "report_folder",
    type=click.Path(path_type=Path),
    help="Write report.html, report.md and report.json here.",
)
@click.option("--junit", "junit_file", type=click.Path(path_type=Path), help="Write JUnit XML here.")
@click.option("-q", "--quiet", is_flag=True, help="Print one line.")
def command(
    checkpoint: Path,
    package: Path,
    report_folder: Path | None,
    junit_file: Path | None,
    quiet: bool,
    **verification: Any,
) -> None:
    """Compare what PACKAGE computes with the PyTorch model of MODEL.PT.

    PACKAGE is an .mlpackage, an .aimodel, or the folder that `edkm-export coreml`, `onnx` or `coreai` made. Exit status
    0: passed, 1: failed.
    """
    from edkm_export.atomic import atomic_file, check_output
    from edkm_export.checkpoint import load
    from edkm_export.cli.console import err, fault_lines, out, print_report, summary_line
    from edkm_export.errors import InputError
    from edkm_export.verify.junit import junit
    from edkm_export.verify.report import Verdict
    from edkm_export.verify.write import write_report

    found = find_artifact(package)
    if junit_file is not None:
        check_output(junit_file, overwrite=True)
    if report_folder is not None:
        try:
            report_folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise InputError(f"{report_folder}: is a file; --report takes a folder.") from error
    err.quiet = quiet
    with err.status(f"reading {checkpoint}"):
        loaded = load(checkpoint)
    report = climb(loaded, found, prepare(loaded, **verification))
    err.quiet = False
    if report_folder is not None:
        write_report(report, report_folder)
    if junit_file is not None:
        with atomic_file(junit_file, overwrite=True) as temporary:
            temporary.write_text(junit(report), encoding="utf-8")
    if quiet:
        out.print(summary_line(report), soft_wrap=True)
    else:
        print_report(report)
        for line in fault_lines(report):
            out.print(line, soft_wrap=True)
        if report_folder is not None:
            out.print(f"report: {report_folder / 'report.html'}", soft_wrap=True)
    if report.verdict is Verdict.FAIL:
        sys.exit(1)
