r"""How near to the original other tools come at equal bits, with the same model and the same texts.

    python -m benchmarks.quality_peers MODEL --calibration prose.txt --text cfi.txt:0.3 --text devil.txt \
        --text wikitext2-valid.txt --bits 4 --bits 3 --bits 2 --peer autoround=/venvs/autoround/bin/python \
        --peer gptq=/venvs/gptq/bin/python --json peers.json --markdown peers.md

Each row runs in a process of its own with a deadline, with the peer's recommended settings and the same calibration
text, in an environment of its own: --peer NAME=PYTHON, since pins of packages clash. Names and packages:

    autoround    auto-round
    coremltools  coremltools, transformers
    coreai-opt   coreai-opt, transformers
    gptq         llmcompressor
    torchao      torchao, transformers
    llamacpp     transformers; llama.cpp comes from npm's node-llama-cpp (EDKM_LLAMACPP names its folder)
    mlx          mlx-lm, mlx[cpu] or mlx[cuda], torch, transformers

A row is judged by its dequantized weights in transformers' own float32 model: KL to the original in nats a token, ratio
of the perplexities, and top-1 agreement. Bits a weight count all that is stored (scales, zero points, LUTs; what a row
leaves alone takes 16), and those of the decoder's matrices alone. Rows that train do so for --minutes, or for as long
as the slowest of the other peers took. A row that cannot be run says why. A text FILE:0.3 starts at 30% of the file's
characters; it must not be the calibration text.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.accuracy import split
from benchmarks.peers.judging import Judge
from benchmarks.peers.rows import NotRun, Row, Setting, rows_of
from edkm_export.reference.source import Source, load_model, load_tokenizer
from edkm_export.text import read_text, token_windows

CONTEXT = 512


def prepare(
    reference: str, calibration: Path, tokens: int, training_tokens: int, work: Path
) -> tuple[Any, Any, dict[str, Path]]:
    """The float32 model and its tokenizer; files that rows are given."""
    source = Source.parse(reference).locate()
    tokenizer, original = load_tokenizer(source), load_model(source, torch.float32)
    files = {name: work / name for name in ("model", "windows.json", "training.json")}
    original.save_pretrained(files["model"])
    tokenizer.save_pretrained(files["model"])
    for name, count in (("windows.json", tokens), ("training.json", training_tokens)):
        windows = token_windows(
            read_text(calibration), tokenizer, tokens=count, context=CONTEXT, source=str(calibration)
        )
        files[name].write_text(json.dumps(windows.tolist()))
    return original, tokenizer, files


def lines(records: list[dict[str, Any]], texts: list[str]) -> list[list[str]]:
    """Cells of the table, with what a row needs to be run again."""
    found = []
    for record in records:
        head = [str(record["bits"]), record["row"]]
        if "reason" in record:
            found.append([*head, "NOT RUN", "", "", *("" for _ in texts), record["reason"]])
            continue
        cells = []
        for text in texts:
            measured, ratio = record["texts"][text], record["ratios"][text]
            cells.append(f"{measured['kl']:.3f} / x{ratio:.3f} / {measured['top1']:.1%}")
        size = [f"{record['decoder_bits']:.2f}", f"{record['all_bits']:.2f}", f"{record['seconds']:.0f} s"]
        found.append([*head, *size, *cells, record["settings"]])
    return found


def markdown(records: list[dict[str, Any]], texts: list[str], command: str) -> str:
    """A section for docs/results.md."""
    heads = ["bits", "", "decoder", "all", "time", *(Path(text).name for text in texts), "settings"]
    rows = [heads, ["---"] * len(heads), *lines(records, texts)]
    known = (record.get("versions", {}).items() for record in records)
    versions = sorted({f"{name} {version}" for each in known for name, version in each})
    return "\n".join(
        [
            "## Peers at equal bits",
            "",
            "KL to the original in nats a token / perplexity as a multiple of the original's / top-1 agreement.",
            "",
            *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows),
            "",
            f"Versions: {', '.join(versions)}.",
            "",
            f"    {command}",
            "",
        ]
    )


def measured(
    row: Row, setting: Setting, judge: Judge, floats: dict[str, Any], minutes: float
) -> dict[str, Any]:
    """The record of a row."""
    record: dict[str, Any] = {"bits": row.bits, "row": row.name}
    try:
        result, seconds = row.run(setting, minutes)
    except NotRun as reason:
        return record | {"reason": str(reason)}
    found = judge.measure(result)
    whole, inner = judge.bits_per_weight(result)
    ratios = {text: each["perplexity"] / floats[text]["perplexity"] for text, each in found.items()}
    return record | {
        "decoder_bits": inner, "all_bits": whole, "seconds": seconds, "settings": result.settings,
        "versions": dict(result.versions), "texts": found, "ratios": ratios,
    }  # fmt: skip


@click.command(help=__doc__)
@click.argument("model")
@click.option("--calibration", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--calibration-tokens", default=128 * CONTEXT, show_default=True)
@click.option("--training-tokens", default=2048 * CONTEXT, show_default=True, help="For rows that train.")
@click.option("--text", "texts", required=True, multiple=True)
@click.option("--eval-tokens", default=4096, show_default=True)
@click.option("--bits", "sizes", default=["4", "3", "2"], multiple=True, type=click.Choice(["4", "3", "2"]))
@click.option("--peer", "peers", multiple=True, help="NAME=PYTHON: the interpreter of a peer's environment.")
@click.option("--row", "chosen", multiple=True, help="Only rows whose name has this in it.")
@click.option(
    "--minutes", type=float, help="Of rows that train.  [default: as long as the slowest other peer took]"
)
@click.option("--deadline-minutes", default=60.0, show_default=True, help="Of a row.")
@click.option("--device", default="cpu", type=click.Choice(["cpu", "cuda"]), show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Where records are written as they come."
)
@click.option("--markdown", "markdown_file", type=click.Path(path_type=Path))
def main(
    model: str,
    calibration: Path,
    calibration_tokens: int,
    training_tokens: int,
    texts: tuple[str, ...],
    eval_tokens: int,
    sizes: tuple[str, ...],
    peers: tuple[str, ...],
    chosen: tuple[str, ...],
    minutes: float | None,
    deadline_minutes: float,
    device: str,
    seed: int,
    json_file: Path | None,
    markdown_file: Path | None,
) -> None:
    console = Console(width=200)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        original, tokenizer, files = prepare(model, calibration, calibration_tokens, training_tokens, work)
        evaluation = {}
        for text in texts:
            path, start = split(text)
            whole = read_text(path)
            evaluation[text] = token_windows(
                whole[int(len(whole) * start) :], tokenizer, tokens=eval_tokens, context=CONTEXT, source=text
            )
        judge = Judge(original.to(device).eval(), evaluation)
        floats = judge.floats()
        setting = Setting(
            model, files["model"], calibration, files["windows.json"], files["training.json"], device, seed, work,
            dict(peer.split("=", 1) for peer in peers), deadline_minutes * 60,
        )  # fmt: skip
        records: list[dict[str, Any]] = []
        for bits in sizes:
            slowest = 0.0
            for row in rows_of(int(bits)):
                if chosen and not any(part in row.name for part in chosen):
                    continue
                length = minutes if minutes is not None else max(slowest / 60, 1.0)
                record = measured(row, setting, judge, floats, length)
                if row.peer != "ours" and not row.trains:
                    slowest = max(slowest, record.get("seconds", 0.0))
                records.append(record)
                console.print("; ".join(lines([record], list(texts))[0]), highlight=False, markup=False)
                if json_file is not None:
                    json_file.write_text(json.dumps({"float": floats, "rows": records}, indent=1))
    table = Table("bits", "row", "decoder", "all", "time", *(Path(text).name for text in texts), "settings")
    for line in lines(records, list(texts)):
        table.add_row(*line)
    console.print(table)
    if markdown_file is not None:
        names = [*(f"--text {Path(text).name}" for text in texts), *(f"--bits {bits}" for bits in sizes)]
        words = f"python -m benchmarks.quality_peers MODEL --calibration {calibration.name} {' '.join(names)}"
        markdown_file.write_text(
            markdown(records, list(texts), f"{words} --device {device} --seed {seed} --peer ...")
        )


if __name__ == "__main__":
    main()
