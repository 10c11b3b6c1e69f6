r"""Accuracy of a model in one shot and after training, by method, bits and seed; and what each ingredient brings.

    python -m benchmarks.accuracy MODEL --data train-prose.txt --text cfi.txt --text cfi.txt:0.3 \
        --questions arc_easy.jsonl --part methods --tokens 4000000 --parallel 3 --rows accuracy.jsonl

Parts:
    methods    one shot, straight-through, soft and exact DKM, at 4, 3 and 2 bits, all else equal (presets)
    ablation   the preset with one ingredient changed at a time, in one shot and trained

Each run is a process of its own, --parallel of them share the device. Its result is appended to --rows when it is
known, and the same command skips what is there and goes on with runs that were stopped (run folders are kept in
--work). A text FILE:0.3 starts at 30% of the file's characters. Perplexity has its standard error; KL and top-1 are
against the original. With --generate, text that the original writes itself is added to the data.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.train_smollm2 import write_tokens
from edkm_export import checkpoint
from edkm_export.reference.hard_model import load_hard_model
from edkm_export.reference.source import Source, load_model, load_tokenizer
from edkm_export.text import read_text, token_windows
from edkm_export.training import run as training
from edkm_export.training.evaluation import evaluate
from edkm_export.training.train_config import PRESETS, TrainConfig
from edkm_export.verify.multiple_choice import grade, load_items

# One step at no rate: the model as training finds it.
ONE_SHOT: dict[str, Any] = {
    "steps": 1, "minutes": None, "tokens": None, "weight_rate": 0.0, "lut_rate": 0.0, "norm_rate": 0.0,
    "backward": "straight-through", "log_every": 1,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "one-shot": ONE_SHOT,
    "straight-through": {"backward": "straight-through"},
    "soft": {"backward": "soft"},
    "dkm": {"backward": "dkm", "iterations": 3},
}
OUTER = ("embed_tokens", "lm_head", "wte", "wpe")


@dataclass(frozen=True)
class Run:
    """A training run: a preset and what differs from it."""

    name: str
    preset: str
    seed: int
    changes: dict[str, Any]

    @property
    def key(self) -> str:
        """Name of its folder; its last part stands for the settings."""
        changes = hashlib.sha256(json.dumps(self.changes, sort_keys=True).encode()).hexdigest()[:8]
        return re.sub(r"[^\w.-]+", "-", f"{self.preset} {self.name} seed{self.seed} {changes}")


def ablations(preset: TrainConfig) -> dict[str, dict[str, Any]]:
    """What is changed, one at a time; an ingredient that the preset has is left out, another is added."""
    other = {"distillation": "cross-entropy", "cross-entropy": "distillation"}
    found: dict[str, dict[str, Any]] = {
        "preset": {},
        "with folded scales" if not preset.fold_scales else "without folded scales": {
            "fold_scales": not preset.fold_scales
        },
        "without mixed bits": {"target_decoder_bits": None},
        "seeds weighted by energy": {"importance": "energy"},
        "seeds not weighted": {"importance": "none"},
        other[preset.objective]: {"objective": other[preset.objective]},
        "without norms trained": {"train_norms": False},
    }
    methods = {
        name: changes for name, changes in METHODS.items() if name in ("straight-through", "soft", "dkm")
    }
    return found | {
        name: changes for name, changes in methods.items() if changes["backward"] != preset.backward
    }


# The start of a run depends on these only.
OF_THE_START = {"fold_scales", "target_decoder_bits", "importance"}


def runs_of(part: str, presets: Sequence[str], seeds: Sequence[int], budget: dict[str, Any]) -> list[Run]:
    made = []
    for seed in seeds:
        for preset in presets:
            if part == "methods":
                for name, changes in METHODS.items():
                    made.append(Run(name, preset, seed, {**budget, **changes}))
                continue
            for name, changes in ablations(PRESETS[preset]).items():
                if set(changes) <= OF_THE_START:
                    made.append(Run(f"one-shot, {name}", preset, seed, {**budget, **ONE_SHOT, **changes}))
                made.append(Run(name, preset, seed, {**budget, **changes}))
    return made


def measure(model: Any, original: Any | None, tokenizer: Any, given: dict[str, Any]) -> dict[str, Any]:
    """All texts and questions."""
    texts, questions = {}, {}
    for text in given["texts"]:
        path, start = split(text)
        whole = read_text(path)
        windows = token_windows(
            whole[int(len(whole) * start) :], tokenizer, tokens=given["eval_tokens"], context=given["context"],
            source=text,
        )  # fmt: skip
        texts[Path(text).name] = asdict(evaluate(model, windows, original))
    for name in given["questions"]:
        found = grade(model, tokenizer, load_items(Path(name), given["limit"]))
        questions[Path(name).name] = {
            "plain": found.plain,
            "plain_error": found.standard_error(found.plain),
            "normalized": found.normalized,
            "normalized_error": found.standard_error(found.normalized),
            "items": found.items,
        }
    return {"texts": texts, "questions": questions}


def split(text: str) -> tuple[Path, float]:
    """FILE or FILE:share."""
    name, _, start = text.rpartition(":")
    return (Path(name), float(start)) if name else (Path(text), 0.0)


def worker(run: Run | None, given: dict[str, Any]) -> None:
    """Train, measure what is on disk, print JSON; no run: measure the original."""
    source, device = Source.parse(given["model"]), given["device"]
    row: dict[str, Any] = {}
    found = None
    if run is not None:
        folder = Path(given["work"]) / run.key
        if not (folder / "model.pt").is_file():
            config = PRESETS[run.preset].updated({"seed": run.seed, **run.changes})
            data = [Path(name) for name in given["data"]]
            started = time.monotonic()
            training.Run(source, data, folder, config).complete(device=device, resume=True)
            row["wall_s"] = time.monotonic() - started
        found = checkpoint.load(folder / "model.pt")
        inner = [each for name, each in found.palettized.items() if not any(outer in name for outer in OUTER)]
        row["bits"] = sum(each.size_bytes for each in inner) * 8 / sum(each.numel for each in inner)
        trained = found.provenance["training"]
        moved = trained["weight_rate"] > 0 or trained["lut_rate"] > 0
        row |= {"trained_tokens": trained["trained_tokens"] if moved else 0}
    original = load_model(source, torch.float32).to(device).eval()
    model = original if found is None else load_hard_model(found).to(device)
    row |= measure(model, None if found is None else original, load_tokenizer(source), given)
    print(json.dumps(row))


def go(runs: list[Run | None], given: dict[str, Any], path: Path, parallel: int, deadline: float) -> None:
    """Measure those that are not in the file; the end of the time stops what still runs."""
    done = {(row["key"], row["given"]) for row in read(path)}
    shared = {key: value for key, value in given.items() if key not in ("work", "device", "model")}
    mark = json.dumps(shared, sort_keys=True)
    waiting = [run for run in runs if (run.key if run else "original", mark) not in done]
    active: list[tuple[Run | None, subprocess.Popen[str], Any]] = []
    threads = str(max(1, (os.cpu_count() or 1) // parallel))
    try:
        while (waiting or active) and time.monotonic() < deadline:
            while waiting and len(active) < parallel:
                run = waiting.pop(0)
                name = run.key if run else "original"
                log = (Path(given["work"]) / f"{name}.log").open("w", encoding="utf-8")
                task = json.dumps([asdict(run) if run else None, given])
                active.append((run, subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.accuracy", given["model"], "--worker", task],
                    stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, "OMP_NUM_THREADS": threads},
                ), log))  # fmt: skip
                print(f"started {name}", flush=True)
            time.sleep(0.5)
            for entry in [each for each in active if each[1].poll() is not None]:
                active.remove(entry)
                run, process, log = entry
                name = run.key if run else "original"
                assert process.stdout is not None
                out = process.stdout.read().splitlines()
                log.close()
                if process.returncode:
                    last = Path(log.name).read_text().strip().splitlines()[-1:]
                    print(f"FAILED {name}: {last}", flush=True)
                    continue
                row = {"key": name, "given": mark, **(asdict(run) if run else {}), **json.loads(out[-1])}
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                first = next(iter(row["texts"].items()), ("no text", {"perplexity": float("nan")}))
                print(f"done {name}: {first[0]} {first[1]['perplexity']:.2f}", flush=True)
    finally:
        for run, process, log in active:
            process.terminate()
            process.wait()
            log.close()
            print(
                f"stopped {run.key if run else 'original'}: the time is up; the same command goes on with it"
            )
        for run in waiting:
            print(f"NOT RUN {run.key if run else 'original'}")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def spread(values: Sequence[float], form: str) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    mean = format(statistics.fmean(values), form)
    return mean if len(values) < 2 else f"{mean} (seeds ± {statistics.stdev(values):{form}})"


def print_tables(rows: list[dict[str, Any]]) -> None:
    """One table for each text, one for the questions."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row.get("preset", ""), row.get("name", "original")), []).append(row)
    console = Console(width=150)
    for text in dict.fromkeys(text for row in rows for text in row["texts"]):
        table = Table("preset", "run", "bits", "tokens", "perplexity", "KL", "top-1", title=text)
        for (preset, name), some in groups.items():
            cells = [row["texts"][text] for row in some if text in row["texts"]]
            if not cells:
                continue
            perplexity = spread([cell["perplexity"] for cell in cells], ".2f")
            perplexity += f" ± {statistics.fmean(cell['standard_error'] for cell in cells):.2f}"
            known = cells[0]["kl"] is not None
            table.add_row(
                preset, name,
                f"{statistics.fmean(row['bits'] for row in some):.3f}" if known else "",
                f"{statistics.fmean(row['trained_tokens'] for row in some):,.0f}" if known else "",
                perplexity,
                spread([cell["kl"] for cell in cells], ".4f") if known else "",
                spread([cell["top1"] for cell in cells], ".3f") if known else "",
            )  # fmt: skip
        console.print(table)
    names = list(dict.fromkeys(name for row in rows for name in row["questions"]))
    if names:
        heads = [f"{name}, {how}" for name in names for how in ("plain", "per character")]
        table = Table("preset", "run", *heads, title="zero-shot accuracy")
        for (preset, name), some in groups.items():
            shown = []
            for file in names:
                for how in ("plain", "normalized"):
                    cells = [row["questions"][file] for row in some if file in row["questions"]]
                    error = f" ± {cells[0][f'{how}_error']:.1%}" if cells else ""
                    shown.append(spread([cell[how] for cell in cells], ".1%") + error if cells else "")
            table.add_row(preset, name, *shown)
        console.print(table)


@click.command(help=__doc__)
@click.argument("model")
@click.option(
    "--data", multiple=True, type=click.Path(path_type=Path), help="Training text; never one of --text."
)
@click.option("--text", "texts", multiple=True, help="FILE, or FILE:0.3 to start at 30% of it.")
@click.option("--questions", multiple=True, type=click.Path(exists=True), help="JSONL of multiple choice.")
@click.option("--questions-limit", "limit", type=int, help="Only so many of each file.")
@click.option("--eval-tokens", default=4096, show_default=True)
@click.option("--context", default=512, show_default=True)
@click.option(
    "--part", "parts", multiple=True, type=click.Choice(["methods", "ablation"]), default=["methods"]
)
@click.option(
    "--preset", "presets", multiple=True, type=click.Choice(list(PRESETS)), default=["4bit", "3bit", "2bit"]
)
@click.option("--seed", "seeds", multiple=True, type=int, default=[0])
@click.option("--only", multiple=True, help="Only runs of these names.")
@click.option("--minutes", type=float, help="Of training, each run; on a shared device --tokens is fairer.")
@click.option("--tokens", type=int, help="Of training, each run.")
@click.option("--batch-size", type=int, help="[default: 32 on CUDA]")
@click.option("--set", "settings", multiple=True, help="Any setting for all runs, as name=value.")
@click.option(
    "--generate", "wanted", type=int, help="Tokens that the original writes first, unless they are there."
)
@click.option(
    "--generated", type=click.Path(path_type=Path), default=Path("generated.tokens"), show_default=True
)
@click.option("--parallel", default=1, show_default=True)
@click.option(
    "--rows", "path", type=click.Path(path_type=Path), default=Path("accuracy.jsonl"), show_default=True
)
@click.option("--work", type=click.Path(path_type=Path), default=Path("accuracy-runs"), show_default=True)
@click.option("--stop-after", type=float, default=1e9, help="Minutes after which this command ends.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]))
@click.option("--print-only", is_flag=True, help="Print the tables of --rows, run nothing.")
@click.option("--worker", "task", hidden=True)
def main(
    model: str, data: tuple[Path, ...], texts: tuple[str, ...], questions: tuple[str, ...], limit: int | None,
    eval_tokens: int, context: int, parts: tuple[str, ...], presets: tuple[str, ...], seeds: tuple[int, ...],
    only: tuple[str, ...], minutes: float | None, tokens: int | None, batch_size: int | None,
    settings: tuple[str, ...], wanted: int | None, generated: Path, parallel: int, path: Path, work: Path,
    stop_after: float, device: str | None, print_only: bool, task: str | None,
) -> None:  # fmt: skip
    if task is not None:
        run, given = json.loads(task)
        worker(None if run is None else Run(**run), given)
        return
    if print_only:
        print_tables(read(path))
        return
    deadline = time.monotonic() + stop_after * 60
    if (minutes is None) == (tokens is None):
        raise click.UsageError("give one of --minutes and --tokens")
    evaluated = {split(text)[0].resolve() for text in texts}
    if shared := evaluated & {each.resolve() for each in data}:
        raise click.UsageError(f"{shared.pop()} is an evaluation text; do not train on it")
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    budget: dict[str, Any] = {"context": context, "bf16": chosen == "cuda", "log_every": 10}
    budget |= {key: value for key, value in (("minutes", minutes), ("tokens", tokens)) if value is not None}
    budget["batch_size"] = batch_size or (32 if chosen == "cuda" else 4)
    budget |= {name: yaml.safe_load(value) for name, _, value in (each.partition("=") for each in settings)}
    work.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = list(data)
    if wanted:
        if not generated.is_file():
            write_tokens(Source.parse(model), files, generated, wanted, context, chosen)
        files.append(generated)
    given = {
        "model": model, "device": chosen, "data": [str(each) for each in files], "texts": list(texts),
        "questions": [str(each) for each in questions], "limit": limit, "eval_tokens": eval_tokens,
        "context": context, "work": str(work),
    }  # fmt: skip
    runs: list[Run | None] = [None]
    for part in parts:
        runs += [run for run in runs_of(part, presets, seeds, budget) if not only or run.name in only]
    go(runs, given, path, parallel, deadline)
    print_tables(read(path))


if __name__ == "__main__":
    main()
