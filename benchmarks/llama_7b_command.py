"""What a whole `edkm-export train` of a LLaMA-7B takes around its steps: loading, preparation, writing.

`llama_7b.py --command FOLDER` calls it. The model has random weights, in bfloat16 files as on the hub, and the
tokenizer of the small model in fixtures/. Times are those between the stages that the run announces itself.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.llama_7b_model import FIXTURES, write_model
from edkm_export.reference.float_weights import FloatWeights
from edkm_export.reference.source import Source
from edkm_export.training.distributed.processes import Processes
from edkm_export.training.run import Run
from edkm_export.training.train_config import TrainConfig

__all__ = ["time_command"]

STEPS = 3


def time_command(
    weights: FloatWeights, folder: Path, config: TrainConfig, processes: Processes, rows: Path | None
) -> None:
    """Train a few steps, and print what each stage took."""
    if processes.is_first and not (folder / "config.json").is_file():
        start = time.monotonic()
        write_model(weights, folder)
        print(f"{folder}: written in {time.monotonic() - start:.0f} s", flush=True)
    processes.wait()
    stages: list[tuple[str, float]] = []
    output = folder.parent / f"{folder.name}-run"
    data = folder.parent / f"{folder.name}-data.txt"
    if processes.is_first:
        text = (FIXTURES / "calibration.txt").read_text(encoding="utf-8")
        least = 16 * config.context * processes.count
        data.write_text(text * (1 + 8 * least // len(text)), encoding="utf-8")
    processes.wait()
    settings = config.updated(
        {"steps": STEPS, "batch_size": processes.count, "save_every": 0, "importance": "none"}
    )
    run = Run(
        Source.parse(folder),
        [data],
        output,
        settings,
        announce=lambda name: stages.append((name, time.monotonic())),
    )
    begun = time.monotonic()
    outcome = complete_in(run, processes, overwrite=output.exists())
    ended = time.monotonic()
    if not processes.is_first:
        return
    marks = [("starting", begun), *stages, ("", ended)]
    taken: dict[str, float] = {}
    for (name, start), (_, stop) in itertools.pairwise(marks):
        taken[name] = taken.get(name, 0.0) + stop - start
    around = sum(seconds for name, seconds in taken.items() if name != "training")
    for name, seconds in taken.items():
        print(f"  {name}: {seconds:.1f} s")
    print(
        f"around the {STEPS} steps: {around:.1f} s; model.pt {outcome.path.stat().st_size:,} bytes",
        flush=True,
    )
    if rows is not None:
        row: dict[str, Any] = {
            "side": "command",
            "gpus": processes.count,
            "group_size": config.group_size,
            "moments": config.moments,
            "masters": config.masters,
            "stages_s": taken,
            "around_s": around,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        }
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")


def complete_in(run: Run, processes: Processes, *, overwrite: bool) -> Any:
    """`Run.complete` by processes that have met already."""
    run.processes = processes
    with run.folder:
        processes.first(lambda: run.folder.open(resume=False, overwrite=overwrite, tell=print))
        return run.finish(run.train(run.prepare(None), None))
