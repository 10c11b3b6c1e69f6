"""The main job on a real model: SmolLM2-135M palettized at 4 bits, exported and verified.

Prints each figure beside what it must reach; exit status 1 when one does not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Measured, measure


def edkm(*arguments: object) -> Measured:
    return measure([sys.executable, "-m", "edkm_export", *map(str, arguments)])


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--calibration", type=click.Path(exists=True, path_type=Path), help="None: plain k-means.")
@click.option("--text", required=True, type=click.Path(exists=True, path_type=Path), help="Perplexity text.")
@click.option("--output", default="smollm2-output", type=click.Path(path_type=Path), show_default=True)
@click.option("--bits", default=4, show_default=True)
@click.option(
    "--interface", default="swift-transformers", show_default=True, help="`logits` has windows of 512."
)
def main(model: Path, calibration: Path | None, text: Path, output: Path, bits: int, interface: str) -> None:
    output.mkdir(parents=True, exist_ok=True)
    checkpoint, bundle = str(output / "smollm2.pt"), str(output / "smollm2-coreml")
    source = ("--original", model, "--report", output)
    weights = () if calibration is None else ("--calibration", calibration)
    palettize = edkm("palettize", model, "--bits", bits, *weights, "-o", checkpoint, "--overwrite")
    export = edkm("coreml", checkpoint, "--interface", interface, "-o", bundle, "--no-verify", "--overwrite")
    verify = edkm("verify", checkpoint, bundle, "--tokens", 1024, *source)
    short = json.loads((output / "report.json").read_text())
    # Plain clustering may be far worse than the default threshold; here it is to be measured, not judged.
    lenient = ("--max-perplexity-ratio", 1e9)
    quality = edkm("verify", checkpoint, bundle, "--tokens", 4096, "--text", text, *source, *lenient)
    long = json.loads((output / "report.json").read_text())
    rungs = {rung["id"]: rung["measures"] for rung in short["rungs"]}
    exact, total = rungs["bytes"]["bit_exact"], rungs["bytes"]["palettized"]
    off = abs(rungs["size"]["actual_bytes"] / rungs["size"]["predicted_bytes"] - 1)
    found = long["perplexities"]
    rows = [
        ("palettize", f"{palettize.seconds:.0f} s", "300 s", palettize.seconds <= 300),
        ("  peak memory", f"{palettize.peak_bytes / 1e9:.2f} GB", "1.77 GB", palettize.peak_bytes <= 1.77e9),
        ("export", f"{export.seconds:.0f} s", "90 s", export.seconds <= 90),
        ("  peak memory", f"{export.peak_bytes / 1e9:.2f} GB", "2.5 GB", export.peak_bytes <= 2.5e9),
        ("verify 1,024 tokens", f"{verify.seconds:.0f} s", "180 s", verify.seconds <= 180),
        ("  peak memory", f"{verify.peak_bytes / 1e9:.2f} GB", "-", True),
        ("bit-exact tensors", f"{exact} of {total}", f"{total}", exact == total),
        ("weights against prediction", f"{off:.3%}", "1%", off <= 0.01),
        ("bits a weight", f"{short['bits_per_weight']:.3f}", "-", True),
    ]
    for precision, least, largest in (("float32", 0.999, 1e-5), ("rounded", 0.99, 1e-3)):
        measures = rungs[f"execution-{precision}"]
        top1, kl = measures["top1_agreement"], measures["kl_median"]
        rows.append((f"top-1 agreement, {precision}", f"{top1:.2%}", f"{least:.1%}", top1 >= least))
        rows.append((f"median KL, {precision}", f"{kl:.2g}", f"{largest:g}", kl <= largest))
    for name in ("original", "hard PyTorch"):
        value = f"{found[name]['value']:.2f} ± {found[name]['standard_error']:.2f}"
        rows.append((f"perplexity of {text.name}, {name}", value, "-", True))
    rows.append(("verify 4,096 tokens", f"{quality.seconds:.0f} s", "-", True))
    table = Table("figure", "found", "must reach", "")
    for name, value, goal, ok in rows:
        table.add_row(name, value, goal, "" if goal == "-" else "ok" if ok else "MISSED")
    Console().print(table)
    statuses = (palettize.status, export.status, verify.status, quality.status)
    sys.exit(0 if all(ok for *_, ok in rows) and not any(statuses) else 1)


if __name__ == "__main__":
    main()
