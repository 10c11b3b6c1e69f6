"""edkm-export coreml: a palettized checkpoint becomes a verified Core ML package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from edkm_export.api.formats import CoreMLFormat
from edkm_export.cli.export import export_arguments, export_options, kv_cache_option, run_export
from edkm_export.cli.lint_table import show_findings, warn_of

if TYPE_CHECKING:  # importing these takes torch, which `--help` must not wait for
    from converters.coreml.write.export_plan import ExportPlan
    from edkm_export.checkpoint import Checkpoint

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


class _Target(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A deployment target in any usual spelling."""

    name = "target"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Read it."""
        from converters.coreml.write.deployment_target import parse_target

        return parse_target(str(value))


@click.command("coreml", short_help="Convert a palettized checkpoint to Core ML and verify the result.")
@export_arguments
@click.option(
    "--interface",
    type=click.Choice(["swift-transformers", "neural-engine", "logits", "embedding"]),
    help="How an app calls it: swift-transformers (cache, any length), neural-engine (cache, static prefill and "
    "decode functions), logits (whole texts, no cache) or embedding (one vector a text, of a model from a folder of "
    "sentence-transformers).  [default: swift-transformers, or embedding where MODEL.PT holds such a model]",
)
@click.option(
    "--target",
    type=_Target(),
    metavar="iOS16|iOS17|iOS18",
    default="iOS18",
    show_default=True,
    help="Oldest system to run on; macOS13, macOS14 and macOS15 mean the same.",
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
@kv_cache_option("Refused here: Core ML's states are float16.")
@export_options
def command(
    checkpoint: Path,
    output: Path | None,
    interface: str | None,
    target: str,
    sequence_length: int | None,
    prefill: int,
    chunks: int | Literal["auto"],
    kv_cache: str,
    **common: Any,
) -> None:
    """Convert MODEL.PT to a Core ML package, bit for bit, and verify the files on disk.

    The folder holds the .mlpackage, the tokenizer, a model card and the verification report. --dry-run also shows
    what devices are known to do with such a package. Exit status 1: it was made, but the export
    is not proved faithful, or the quality is beyond its limit.
    """
    run_export(
        _CoreMLExporter(interface, target, sequence_length, prefill, chunks, kv_cache),
        checkpoint,
        output,
        **common,
    )


@dataclass(frozen=True)
class _CoreMLExporter(CoreMLFormat):
    """See `export.Exporter`."""

    suffix: str = "coreml"

    def show(self, checkpoint: Checkpoint, plan: ExportPlan, name: str) -> None:
        from rich.table import Table

        from converters.coreml.write.lint import lint
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
                file,
                f"layers {layers.first} to {layers.end - 1}, {megabytes(size)} of weights ({size:,} bytes)",
            )
        out.print(table)
        show_findings(lint(checkpoint, plan))

    def warn(self, checkpoint: Checkpoint, plan: ExportPlan) -> None:
        from converters.coreml.write.lint import lint

        warn_of(lint(checkpoint, plan))

    def next_commands(self, plan: ExportPlan, folder: Path, checkpoint: Path) -> list[str]:
        from converters.coreml.write.card import mac_commands
        from edkm_export.command_line import command_line

        name = checkpoint.stem
        packages = " and ".join(plan.package_names(name))
        generate = command_line("generate", folder, "--prompt", "Once upon a time")
        return [
            f"{folder}: drag {packages} into Xcode; report.md says what was proved and what was not.",
            "on a Mac, where this was not run:",
            *(f"    {line}" for line in mac_commands(plan, name, folder, checkpoint)),
            *([] if plan.interface == "embedding" else [f"next: {generate}"]),
        ]
