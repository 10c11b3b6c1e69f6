"""edkm-export coreai: a palettized checkpoint becomes a verified Core AI model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edkm_export.api.formats import CoreAIFormat
from edkm_export.cli.export import (
    cache_row,
    export_arguments,
    export_options,
    kv_cache_option,
    run_export,
)
from edkm_export.cli.lint_table import show_findings, warn_of
from edkm_export.command_line import command_line

if TYPE_CHECKING:  # importing these takes torch, which `--help` must not wait for
    from converters.coreai.write.export_plan import CoreAIPlan
    from edkm_export.checkpoint import Checkpoint

__all__ = ["command"]


@click.command("coreai", short_help="Convert a palettized checkpoint to Core AI and verify the result.")
@export_arguments
@click.option(
    "--interface",
    type=click.Choice(["dynamic", "neural-engine"]),
    default="dynamic",
    show_default=True,
    help="Which of Apple's engines runs it: dynamic (one function for texts of any length; GPU) or neural-engine "
    "(functions of fixed shapes).",
)
@click.option("--context-length", type=int, help="Positions of the longest text.  [default: the model's]")
@click.option(
    "--pad-3bit", is_flag=True, help="Hold 3-bit indices in 4 bits, as Apple's own converter would."
)
@kv_cache_option("About half of float16, with --interface dynamic; Apple's ready-made engines do not run it.")
@export_options
def command(
    checkpoint: Path,
    output: Path | None,
    interface: str,
    context_length: int | None,
    pad_3bit: bool,
    kv_cache: str,
    **common: Any,
) -> None:
    """Convert MODEL.PT to a Core AI model for iOS 27 and macOS 27, bit for bit, and verify the files on disk.

    The folder holds the .aimodel, the tokenizer, metadata as Apple's runner reads it, and the verification report. The
    model is run by Apple's own runtime, here on the CPU; no Mac is needed. Exit status 1: it was made, but failed
    verification.
    """
    exporter = _CoreAIExporter(interface, context_length, pad_3bit, kv_cache)
    run_export(exporter, checkpoint, output, **common)


@dataclass(frozen=True)
class _CoreAIExporter(CoreAIFormat):
    """See `export.Exporter`."""

    suffix: str = "coreai"

    def show(self, checkpoint: Checkpoint, plan: CoreAIPlan, name: str) -> None:
        from rich.table import Table

        from converters.coreai.write.lint import lint
        from edkm_export.cli.console import megabytes, out

        table = Table(title="plan (nothing was written)", title_justify="left", show_header=False)
        table.add_row("interface", plan.interface)
        table.add_row("positions", f"{plan.context:,}")
        table.add_row("functions", ", ".join(plan.function_names))
        row = cache_row(plan.kv_cache, plan.cache_bytes_per_token, plan.context)
        table.add_row("keys and values", row)
        table.add_row("weights", f"{megabytes(plan.weights_size_bytes)} ({plan.weights_size_bytes:,} bytes)")
        out.print(table)
        show_findings(lint(checkpoint, plan))

    def warn(self, checkpoint: Checkpoint, plan: CoreAIPlan) -> None:
        from converters.coreai.write.lint import lint

        warn_of(lint(checkpoint, plan))

    def next_commands(self, plan: CoreAIPlan, folder: Path, checkpoint: Path) -> list[str]:
        lines = [
            f"{folder}: report.md says what was proved and what was not.",
            f"next: {command_line('generate', folder, '--prompt', 'Once upon a time')}",
        ]
        if plan.kv_cache == "float":
            lines.append(
                "on a Mac with macOS 27, where this was not run: open the folder with the runner of apple/coreai-models"
            )
        return lines
