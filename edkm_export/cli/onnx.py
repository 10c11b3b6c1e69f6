"""edkm-export onnx: a palettized checkpoint becomes a verified ONNX folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from edkm_export.cli.verification import climb, prepare, verification_options

__all__ = ["command"]


@click.command("onnx", short_help="Convert a palettized checkpoint to ONNX and verify the result.")
@click.argument("checkpoint", metavar="MODEL.PT", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder to make.  [default: MODEL-onnx]"
)
@click.option(
    "--runtime",
    type=click.Choice(["exact", "low-memory", "fast"]),
    default="exact",
    show_default=True,
    help="exact: any LUT, float32 arithmetic. low-memory: the same, weights are decoded when they are used. "
    "fast: int8 or int4 LUTs, activations rounded to int8.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Of activations, cache and logits.",
)
@click.option("--opset", type=int, help="Version of the standard operators.  [default: 23, exact: 18]")
@click.option("--context-length", type=int, help="Positions of the longest text.  [default: the model's]")
@click.option("--standard-ops", is_flag=True, help="With --runtime fast: no operators of onnxruntime's own.")
@click.option("--no-verify", is_flag=True, help="Do not verify; the folder then holds no report.")
@verification_options
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
def command(
    checkpoint: Path,
    output: Path | None,
    runtime: str,
    dtype: str,
    opset: int | None,
    context_length: int | None,
    standard_ops: bool,
    no_verify: bool,
    overwrite: bool,
    **verification: Any,
) -> None:
    """Convert MODEL.PT to an ONNX decoder with cache, bit for bit, and verify the files on disk.

    The folder holds the graph, its weights, the tokenizer and the verification report; onnxruntime-genai, optimum and
    transformers.js load it as it is. Exit status 1: it was made, but failed verification.
    """
    from converters.onnx.bundle import write_bundle
    from converters.onnx.plan import plan_onnx
    from edkm_export.atomic import atomic_folder, check_output
    from edkm_export.checkpoint import load
    from edkm_export.cli.console import err, out, print_report, print_unverified
    from edkm_export.verify.report import Verdict
    from edkm_export.verify.write import write_report

    folder = output or checkpoint.with_name(f"{checkpoint.stem}-onnx")
    check_output(folder, overwrite=overwrite, folder=True)
    with err.status(f"reading {checkpoint}"):
        loaded = load(checkpoint)
    evaluation = None if no_verify else prepare(loaded, **verification)
    with err.status("tracing the decoder"):
        plan = plan_onnx(
            loaded, runtime=runtime, dtype=dtype, opset=opset, context=context_length, standard_ops=standard_ops
        )  # fmt: skip
    report = None
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        with err.status(f"writing {len(loaded.palettized)} palettized weights"):
            write_bundle(loaded, plan, temporary)
        if evaluation is not None:
            report = climb(loaded, temporary, evaluation, plan.weights_size_bytes)
            report = report.model_copy(update={"artifact": folder.absolute().name})  # as it will be called
            write_report(report, temporary)
    if report is None:
        print_unverified(folder, checkpoint, plan.weights_size_bytes)
        return
    print_report(report)
    out.print(
        f"{folder}: try it with `edkm-export generate {folder} --prompt TEXT`; "
        "report.md says what was proved and what was not.",
        soft_wrap=True,
    )
    if report.verdict is Verdict.FAIL:
        sys.exit(1)
