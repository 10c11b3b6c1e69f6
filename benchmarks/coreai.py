r"""A palettized model to Core AI and back through Apple's runtime: time, memory and agreement.

    python -m benchmarks.coreai smollm2.pt --original MODEL.gguf
    python -m benchmarks.coreai llama-1b.pt --export-only --interface dynamic

Each interface is exported and, unless told otherwise, verified on 1,024 tokens. Prints each figure beside what it must
reach; exit status 1 when one does not. `benchmarks.llama_1b` makes the second model.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Measured, measure
from edkm_export import checkpoint as checkpoints

TWIN = "execution-coreai-twin"


def edkm(*arguments: object) -> Measured:
    return measure([sys.executable, "-m", "edkm_export", *map(str, arguments)])


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@click.command(help=__doc__)
@click.argument("checkpoint", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--original", help="The float model, when it is not where it was palettized from.")
@click.option("--interface", "interfaces", multiple=True, default=("dynamic", "neural-engine"))
@click.option("--tokens", default=1024, show_default=True)
@click.option("--export-only", is_flag=True)
@click.option("--export-minutes", default=3.0, show_default=True, help="That an export may take.")
@click.option("--export-gb", default=2.5, show_default=True, help="Peak memory that it may take.")
@click.option("--verify-minutes", default=5.0, show_default=True, help="That a verification may take.")
@click.option("--output", type=click.Path(path_type=Path), help="Keep the folders here.")
def main(
    checkpoint: Path,
    original: str | None,
    interfaces: tuple[str, ...],
    tokens: int,
    export_only: bool,
    export_minutes: float,
    export_gb: float,
    verify_minutes: float,
    output: Path | None,
) -> None:
    print(checkpoints.load(checkpoint))
    rows: list[tuple[str, str, str, bool]] = []
    statuses = []
    with tempfile.TemporaryDirectory() as temporary:
        for interface in interfaces:
            folder = (output or Path(temporary)) / interface
            made = edkm(
                "coreai", checkpoint, "--interface", interface, "-o", folder, "--no-verify", "--overwrite"
            )
            statuses.append(made.status)
            rows += [
                (f"{interface}: export", f"{made.seconds:.0f} s", f"{60 * export_minutes:.0f} s",
                 made.seconds <= 60 * export_minutes),
                ("  peak memory", f"{made.peak_bytes / 1e9:.2f} GB", f"{export_gb:g} GB",
                 made.peak_bytes <= export_gb * 1e9),
                ("  .aimodel", f"{size(folder / f'{checkpoint.stem}.aimodel') / 1e6:.1f} MB", "-", True),
            ]  # fmt: skip
            if not export_only:
                status, more = verified(checkpoint, folder, original, tokens, verify_minutes)
                statuses.append(status)
                rows += more
    table = Table("figure", "found", "must reach", "")
    for name, value, goal, ok in rows:
        table.add_row(name, value, goal, "" if goal == "-" else "ok" if ok else "MISSED")
    Console().print(table)
    sys.exit(0 if all(ok for *_, ok in rows) and not any(statuses) else 1)


def verified(
    checkpoint: Path, folder: Path, original: str | None, tokens: int, minutes: float
) -> tuple[int, list[tuple[str, str, str, bool]]]:
    """Exit status, and rows."""
    source = ("--original", original) if original else ()
    # one-shot palettization may be far from the original; here the export is judged
    lenient = ("--max-perplexity-ratio", "none")
    done = edkm("verify", checkpoint, folder, "--tokens", tokens, "--report", folder, *source, *lenient)
    report = json.loads((folder / "report.json").read_text())
    rungs = {rung["id"]: rung["measures"] for rung in report["rungs"]}
    exact, total = rungs["bytes"]["bit_exact"], rungs["bytes"]["palettized"]
    decoded = rungs["decoding"]["equal"]
    off = abs(rungs["size"]["actual_bytes"] / rungs["size"]["predicted_bytes"] - 1)
    twin = rungs[TWIN]
    top1, kl = twin["top1_agreement"], twin["kl_mean"]
    return done.status, [
        ("  verify", f"{done.seconds:.0f} s", f"{60 * minutes:.0f} s", done.seconds <= 60 * minutes),
        ("    peak memory", f"{done.peak_bytes / 1e9:.2f} GB", "-", True),
        ("    faithful export", report["faithful_export"], "PASS", report["faithful_export"] == "PASS"),
        ("    bit-exact by our reader", f"{exact} of {total}", f"{total}", exact == total),
        ("    decoded by Apple's runtime", f"{decoded} of {total}", f"{total}", decoded == total),
        ("    size against prediction", f"{off:.3%}", "1%", off <= 0.01),
        (f"    twin, {twin['tokens']} tokens: mean KL", f"{kl:.2g}", "1e-4", kl <= 1e-4),
        ("    twin: top-1 agreement", f"{top1:.2%}", "99%", top1 >= 0.99),
    ]


if __name__ == "__main__":
    main()
