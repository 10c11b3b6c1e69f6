"""edkm-export onnx: a palettized checkpoint becomes a verified ONNX folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edkm_export.api.formats import OnnxFormat
from edkm_export.cli.export import (
    cache_row,
    export_arguments,
    export_options,
    kv_cache_option,
    run_export,
)
from edkm_export.command_line import command_line

if TYPE_CHECKING:  # importing these takes torch, which `--help` must not wait for
    from converters.onnx.write.export_plan import OnnxPlan
    from edkm_export.checkpoint import Checkpoint

__all__ = ["command"]


@click.command("onnx", short_help="Convert a palettized checkpoint to ONNX and verify the result.")
@export_arguments
@click.option(
    "--runtime",
    type=click.Choice(["exact", "low-memory", "fast"]),
    default="exact",
    show_default=True,
    help="exact: any LUT, float32 arithmetic. low-memory: the same, weights are decoded when they are used. "
    "fast: int8 or int4 LUTs, activations rounded to int8.",
)
@click.option(
    "--interface",
    type=click.Choice(["decoder", "embedding"]),
    help="decoder: logits, with a cache. embedding: one vector a text, of a model from a folder of "
    "sentence-transformers.  [default: what MODEL.PT holds]",
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
@kv_cache_option("A quarter of float32; onnxruntime runs it, ready-made loaders do not.")
@export_options
def command(
    checkpoint: Path,
    output: Path | None,
    runtime: str,
    interface: str | None,
    dtype: str,
    opset: int | None,
    context_length: int | None,
    standard_ops: bool,
    kv_cache: str,
    **common: Any,
) -> None:
    """Convert MODEL.PT to an ONNX decoder with cache, bit for bit, and verify the files on disk.

    An embedding model becomes a graph of token vectors and one vector a text, for any batch. The folder holds the
    graph, its weights, the tokenizer, a model card and the verification report; onnxruntime-genai, optimum and
    transformers.js load it as it is. Exit status 1: it was made, but the export is not proved faithful, or the quality
    is beyond its limit.
    """
    exporter = _OnnxExporter(runtime, dtype, opset, context_length, standard_ops, interface, kv_cache)
    run_export(exporter, checkpoint, output, **common)


@dataclass(frozen=True)
class _OnnxExporter(OnnxFormat):
    """See `export.Exporter`."""

    suffix: str = "onnx"

    def show(self, checkpoint: Checkpoint, plan: OnnxPlan, name: str) -> None:
        from rich.table import Table

        from edkm_export.cli.console import megabytes, out

        table = Table(title="plan (nothing was written)", title_justify="left", show_header=False)
        table.add_row("interface", plan.interface)
        table.add_row("runtime profile", plan.runtime)
        table.add_row("activations and cache", plan.dtype)
        table.add_row("opset", str(plan.opset))
        table.add_row("positions", f"{plan.context:,}")
        if plan.cache_bytes_per_token and plan.interface == "decoder":
            row = cache_row(plan.kv_cache, plan.cache_bytes_per_token, plan.context)
            table.add_row("keys and values", row)
        table.add_row("weights", f"{megabytes(plan.weights_size_bytes)} ({plan.weights_size_bytes:,} bytes)")
        out.print(table)

    def warn(self, checkpoint: Checkpoint, plan: OnnxPlan) -> None:
        """Nothing: what a profile cannot hold is refused by its plan."""

    def next_commands(self, plan: OnnxPlan, folder: Path, checkpoint: Path) -> list[str]:
        first = f"{folder}: report.md says what was proved and what was not."
        if plan.interface == "embedding":
            return [first]
        return [
            first,
            f"next: {command_line('generate', folder, '--prompt', 'Once upon a time')}",
        ]
