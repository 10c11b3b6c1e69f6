"""edkm-export verify: check a package against its checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from edkm_export.api.artifacts import find_artifact, is_artifact
from edkm_export.api.climbing import climb
from edkm_export.cli.parameter_types import CHECKPOINT, PACKAGE
from edkm_export.cli.verification import prepare, verification_options

__all__ = ["command"]


@click.command("verify", short_help="Check that a package computes what its checkpoint does.")
@click.argument("paths", metavar="[MODEL.PT] OUT", nargs=-1, required=True, type=click.Path(path_type=Path))
@verification_options
@click.option(
    "--report",
    "report_folder",
    type=click.Path(path_type=Path),
    help="Write report.html, report.md and report.json here.",
)
@click.option("--junit", "junit_file", type=click.Path(path_type=Path), help="Write JUnit XML here.")
def command(
    paths: tuple[Path, ...],
    report_folder: Path | None,
    junit_file: Path | None,
    **verification: Any,
) -> None:
    """Compare what OUT computes with the PyTorch model of MODEL.PT.

    OUT is the folder that `edkm-export coreml`, `onnx` or `coreai` made, or the model in it. It knows its MODEL.PT by
    the sha256: without it, the file is looked for near OUT and in the working folder.

    Two verdicts come of it: faithful export, whether OUT computes the model that was trained or palettized, and
    quality, how far palettization moved that from the original. Exit status 0: faithful export PASS, and quality not
    BEYOND its limit; 1: otherwise. With --quiet it is one line.
    """
    from edkm_export.text import check_text

    check_text(verification["text"])
    checkpoint, package = _checkpoint_and_artifact(paths)  # before torch is imported

    from edkm_export.api.cards import refresh_card
    from edkm_export.atomic import atomic_file, check_output, made_folder
    from edkm_export.checkpoint import load
    from edkm_export.cli.common_options import answering, is_quiet
    from edkm_export.cli.console import err, fault_lines, out, print_report, summary_line
    from edkm_export.verify.junit import junit
    from edkm_export.verify.write import write_report

    found = find_artifact(package)
    if junit_file is not None:
        check_output(junit_file, overwrite=True)
    if report_folder is not None:
        _check_folder(report_folder)
    if len(paths) == 1:
        err.print(f"- {package} was exported from {checkpoint}", markup=False, soft_wrap=True)
    with err.status(f"reading {checkpoint}"):
        loaded = load(checkpoint)
    if loaded.weakness:
        err.print(f"- {loaded.weakness}", markup=False, soft_wrap=True)
    report = climb(loaded, found, prepare(loaded, **verification))
    if report_folder is not None:
        with made_folder(report_folder):
            write_report(report, report_folder)
        refresh_card(report_folder, report)
    if junit_file is not None:
        with atomic_file(junit_file, overwrite=True) as temporary:
            temporary.write_text(junit(report), encoding="utf-8")
    if is_quiet():
        with answering():
            out.print(summary_line(report), soft_wrap=True)
    else:
        print_report(report)
        for line in fault_lines(report):
            out.print(line, soft_wrap=True)
        if report_folder is not None:
            out.print(f"report: {report_folder / 'report.html'}", soft_wrap=True)
    if report.failed:
        raise click.exceptions.Exit(1)


def _check_folder(folder: Path) -> None:
    """Refuse, before the long work, a folder for the report that could not be written.

    Raises:
        InputError: it is a file, or there is no permission.
    """
    from edkm_export.errors import InputError

    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not there.is_dir():
        raise InputError(f"{there}: is a file; --report takes a folder.")
    if not os.access(there, os.W_OK):
        raise InputError(f"{folder}: no permission to write to {there}; choose another --report.")


def _checkpoint_and_artifact(paths: tuple[Path, ...]) -> tuple[Path, Path]:
    """The model.pt and the exported model of a command line that may leave the first one out.

    Args:
        paths: one or two, in any order.

    Returns:
        The model.pt, which the record in the exported folder agrees with if there is one, and the exported model.

    Raises:
        InputError: there are others than these, the model.pt is found nowhere, or it is not the one that was exported.
        PackageError: the exported model is missing.
    """
    from edkm_export.checkpoint_record import CheckpointRecord
    from edkm_export.command_line import command_line
    from edkm_export.errors import CheckpointError, InputError
    from edkm_export.unfinished import unfinished_run

    for path in paths:
        if unfinished := unfinished_run(path):
            raise CheckpointError(f"{path}: {unfinished}")
    if len(paths) == 1:
        (exported,) = paths
        if exported.is_file() and not is_artifact(exported):
            raise InputError(
                f"{exported}: is no exported model; name it too: {command_line('verify', exported, 'OUT')}"
            )
        PACKAGE.convert(exported, None, None)
        record = CheckpointRecord.read(exported)
        if record is None:
            raise InputError(
                f"{exported}: does not say which model.pt it was exported from; name it: "
                f"{command_line('verify', 'MODEL.PT', exported)}"
            )
        return record.find(exported), exported
    if len(paths) > 2:
        raise InputError(f"expected MODEL.PT and OUT, got {len(paths)} paths.")
    checkpoint, exported = paths
    if is_artifact(checkpoint) and exported.is_file() and not is_artifact(exported):
        checkpoint, exported = exported, checkpoint
    CHECKPOINT.convert(checkpoint, None, None)
    PACKAGE.convert(exported, None, None)
    if (record := CheckpointRecord.read(exported)) is not None:
        record.require(checkpoint, exported)
    return checkpoint, exported
