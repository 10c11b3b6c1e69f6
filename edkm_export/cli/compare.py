"""edkm-export compare: several checkpoints and artifacts side by side."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from edkm_export.api.artifacts import find_artifact, open_artifact
from edkm_export.api.originals import check_length, find_original, read_evaluation_text
from edkm_export.cli.parameter_types import ARTIFACT, find_named_original, memory_option, original_options
from edkm_export.cli.verification import minutes_option

__all__ = ["command"]


@click.command("compare", short_help="Put several checkpoints and artifacts side by side.")
@click.argument("models", metavar="A B ...", nargs=-1, required=True, type=ARTIFACT)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write the table as a page, such as compare.html."
)
@click.option("--json", "json_output", is_flag=True, help="Print JSON in place of the table.")
@click.option(
    "--text", type=click.Path(path_type=Path), help="Evaluation text; by default a built-in sample."
)
@click.option(
    "--tokens",
    type=click.IntRange(min=2),
    default=1024,
    show_default=True,
    help="Tokens of the text to use.",
)
@original_options
@minutes_option
@memory_option
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
def command(
    models: tuple[Path, ...],
    output: Path | None,
    json_output: bool,
    text: Path | None,
    tokens: int,
    original: str | None,
    adapter: str | None,
    minutes: float | None,
    memory_bytes: int | None,
    overwrite: bool,
) -> None:
    """Compare A, B, ...: each a MODEL.PT, or a folder or package that was exported.

    Perplexity on one text, and the distance from the original float model, if it is there.
    """
    from edkm_export.atomic import atomic_file, check_output
    from edkm_export.text import check_text

    check_text(text)
    named = find_named_original(original, adapter)

    from edkm_export.checkpoint import load
    from edkm_export.cli.console import err, out, print_wide, stages
    from edkm_export.memory_budget import MemoryBudget
    from edkm_export.verify.compare_models import Contestant, compare, comparison_page

    if output is not None:
        check_output(output, overwrite=overwrite)
    content, text_name = read_evaluation_text(text)
    # one model of transformers at a time; artifacts keep what they decoded
    exported = sum(path.suffix != ".pt" for path in models)
    room = MemoryBudget.of(memory_bytes).room_bytes(models=1 + exported)
    contestants, source, missing = [], None, "no checkpoint is among them; name it with --original"
    for path in models:
        if path.suffix == ".pt":
            with err.status(f"reading {path}"):
                loaded = load(path)
            contestants.append(
                Contestant.of_checkpoint(loaded, _name(path, models), path.stat().st_size, room)
            )
            if source is None:
                source, missing = find_original(loaded, named)
        else:
            found = find_artifact(path)
            folder = found.parent if found.suffix in (".mlpackage", ".onnx") else found
            contestants.append(
                Contestant.of_artifact(open_artifact(found, room), _name(path, models), folder)
            )
    if text is not None:
        for entry in contestants:
            check_length(content, entry.tokenizer(), tokens, text_name)
    source = named or source
    with stages(len(contestants) + (source is not None)) as advance:
        comparison = compare(
            contestants,
            content,
            text_name,
            tokens=tokens,
            original=source,
            minutes=minutes,
            room_bytes=room,
            advance=advance,
        )
    if source is None:
        err.print(f"NOT RUN: distance from the original: {missing}")
    if comparison.cut:
        err.print(
            f"{comparison.tokens:,} of {comparison.asked:,} tokens were compared: {comparison.cut}",
            soft_wrap=True,
        )
    if json_output:
        out.print_json(json.dumps([_plain(row) for row in comparison.rows], default=_record))
    else:
        print_wide(_table(comparison.rows))
    if output is not None:
        with atomic_file(output, overwrite=overwrite) as temporary:
            temporary.write_text(comparison_page(comparison), encoding="utf-8")
        out.print(f"page: {output}", soft_wrap=True)


def _name(path: Path, models: tuple[Path, ...]) -> str:
    """The last part of a path, or all of it when another one ends the same."""
    return path.name if sum(other.name == path.name for other in models) == 1 else str(path)


def _plain(row: Any) -> dict[str, Any]:
    return asdict(row)


def _record(value: Any) -> Any:
    return value.model_dump()


def _table(rows: list[Any]) -> Any:
    from rich.table import Table

    table = Table(title="comparison", title_justify="left")
    for words in ("model", "bits", "MB", "perplexity", "KL median", "KL mean", "KL 99.9%", "top-1", "run as"):
        table.add_column(words, justify="left" if words in ("model", "run as") else "right")
    for row in rows:
        found = row.distance
        table.add_row(
            row.name,
            "" if row.bits_per_weight is None else f"{row.bits_per_weight:.2f}",
            "" if row.size_bytes is None else f"{row.size_bytes / 1e6:.1f}",
            f"{row.perplexity.value:.2f} ± {row.perplexity.standard_error:.2f}",
            *(
                [f"{value:.2g}" for value in (found.kl_median, found.kl_mean, found.kl_p999)]
                if found
                else [""] * 3
            ),
            f"{found.top1_agreement:.2%}" if found else "",
            row.kind,
        )
    return table
