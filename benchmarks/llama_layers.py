"""Decoder layers of LLaMA-7B on one device: plain fine-tuning, DKM, the paper's method and ours.

    python -m benchmarks.llama_layers --rows layers.jsonl

Each row is measured in a process of its own and appended to --rows as it is known; the same command goes on where
an earlier one was stopped. Measured are one and two layers, and how many fit: predicted from the two peaks, then
tried, with one layer more or fewer until one number ran and the next did not.

Sides:
    plain              fine-tuning of dense weights
    dkm                DKM as published (arXiv 2108.12659): dense autograd in bfloat16 before each matrix product
    paper              the same under eDKM's marshaling and uniquification (arXiv 2309.00964, section 2), M and U.
                       M holds on the host what dkm holds on the device. S, sharding over learners, is counted and
                       not timed: what one of --learners holds on its host.
    histogram          soft_cluster(method="histogram") before each matrix product, bfloat16 weights
    streaming          soft_cluster(method="streaming") likewise
    straight-through   our palettized modules, with each way that gradients can pass the clustering
    ours-soft
    ours-dkm

"saved" is what autograd keeps from the forward pass, parameters and buffers excluded, whether on the device or on
the host, less what plain fine-tuning keeps. A step is forward, backward, AdamW and a new assignment; on all
sides products run in bfloat16, and the gradient of the last layer's output is given (no embedding, no loss).
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.llama_stack import SIDES, Settings, SoftLinear, Stack, counting, palettize
from edkm_export.training.palettized.batch import ClusterBatch
from edkm_export.training.palettized.surgery import attach, clusters_of

GIB, MIB = 2**30, 2**20
WARM_UP, TIMED = 2, 5  # steps
ENOUGH_S = 20.0  # of steps; a slow side is warmed up and timed with fewer
OUT_OF_MEMORY = 3  # exit status of a worker


def peak_bytes(device: str) -> int:
    """Most memory since the last reset: of the device, or resident on the CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def measure(side: str, layers: int, settings: Settings, *, timed: int) -> dict[str, Any]:
    """Build, warm up, time.

    Returns:
        step_ms, peak_bytes, saved_bytes, saved_sharded_bytes (paper only).
    """
    torch.manual_seed(0)
    device = settings.device
    model = Stack(layers, settings)
    if side != "plain":
        palettize(model, side, settings)
    model.train()
    optimizer = None
    if settings.optimizer:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0, fused=device == "cuda")
        attach(model, optimizer)
    batch = ClusterBatch(list(clusters_of(model).values()))
    dtype = getattr(torch, settings.weights)
    x = torch.randn(1, settings.context, model.width, device=device, dtype=dtype)
    upstream = torch.randn_like(x) * 1e-3

    def forward() -> Tensor:
        SoftLinear.held.clear()
        with torch.autocast(device, torch.bfloat16):
            made: Tensor = model(x)
        return made

    def step() -> None:
        made = forward()
        made.backward(upstream.to(made.dtype))
        SoftLinear.held.clear()
        if optimizer is not None:
            optimizer.step()
            batch.refresh()
        model.zero_grad()

    gc.collect()
    reset_peak(device)
    times: list[float] = []
    began = time.monotonic()
    for index in range(-WARM_UP, timed):
        if time.monotonic() - began > ENOUGH_S and (index < 0 or times):
            continue
        synchronize(device)
        if index == 0:
            reset_peak(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        if index >= 0:
            times.append((time.perf_counter() - start) * 1e3)
    row: dict[str, Any] = {
        "peak_bytes": peak_bytes(device),
        "step_ms": statistics.median(times) if times else None,
    }
    if timed > 1:
        row["step_spread_ms"] = max(times) - min(times)
        with counting(model) as seen:
            made = forward()
        row["saved_bytes"] = sum(seen.values()) + sum(held.size_bytes for held in SoftLinear.held)
        del made
        if side == "paper":
            row["saved_sharded_bytes"] = sharded_bytes(model, forward, settings.learners)
    return row


def sharded_bytes(model: Stack, forward: Any, learners: int) -> int:
    """What one of the learners holds when M, U and S are all on; the collectives are not run."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=learners)
    SoftLinear.process_group = dist.group.WORLD
    try:
        with counting(model) as seen:
            made = forward()
        size = sum(seen.values()) + sum(held.size_bytes for held in SoftLinear.held)
        del made
        return size
    finally:
        SoftLinear.process_group = None
        SoftLinear.held.clear()
        dist.destroy_process_group()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def worker(side: str, layers: int, settings: Settings, timed: int) -> None:
    """Print the row as JSON; exit status 3: out of memory."""
    if settings.device == "cpu":
        measure(side, 1, Settings(**{**asdict(settings), "small": True, "context": 32}), timed=1)  # warms up
    try:
        row = measure(side, layers, settings, timed=timed)
    except (torch.OutOfMemoryError, MemoryError) as error:
        print(str(error).splitlines()[0] if str(error) else "out of memory", file=sys.stderr)
        sys.exit(OUT_OF_MEMORY)
    print(json.dumps(row))


class Rows:
    """The file of results: one JSON object a line, flushed as soon as it is known."""

    def __init__(self, path: Path, settings: Settings, deadline: float) -> None:
        self.path, self.settings, self.deadline = path, settings, deadline
        self.known: dict[tuple[str, int], dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.is_file() else []:
            row = json.loads(line)
            if row["settings"] == asdict(settings):
                self.known[row["side"], row["layers"]] = row

    def get(
        self, side: str, layers: int, *, timed: int, budget: float | None = None
    ) -> dict[str, Any] | None:
        """The row of a side: known from before, or measured now; None when there is no time left.

        A row has "outcome": "ok", "out of memory" or "failed".
        """
        if (side, layers) in self.known:
            return self.known[side, layers]
        left = self.deadline - time.monotonic()
        if left < 10:
            return None
        command = [
            sys.executable,
            "-m",
            "benchmarks.llama_layers",
            "--worker",
            json.dumps([side, layers, asdict(self.settings), timed]),
        ]
        try:
            # Without it, pieces of free memory between the layers decide how many fit.
            environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
            done = subprocess.run(command, capture_output=True, text=True, timeout=left, env=environment)
        except subprocess.TimeoutExpired:
            return None
        row: dict[str, Any] = {"side": side, "layers": layers, "settings": asdict(self.settings)}
        if done.returncode == 0:
            row |= {"outcome": "ok", **json.loads(done.stdout.splitlines()[-1])}
            if budget is not None and row["peak_bytes"] > budget:
                row["outcome"] = "out of memory"
        else:
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            # A process that the kernel kills for its host memory ends with SIGKILL.
            full = done.returncode in (OUT_OF_MEMORY, -9)
            row |= {"outcome": "out of memory" if full else "failed", "reason": reason[:300]}
        self.known[side, layers] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = row.get("reason", "")
        if "step_ms" in row:
            shown = f"{row['step_ms']:.1f} ms, {row['peak_bytes'] / GIB:.2f} GiB"
        print(f"{side}, {layers} layers: {row['outcome']} {shown}", flush=True)
        return row


@dataclass
class Fit:
    """How many layers fit. `confirmed` ran, `refused` did not; both None: not run."""

    predicted: int | None = None
    confirmed: int | None = None
    refused: int | None = None

    def __str__(self) -> str:
        if self.predicted is None:
            return "NOT RUN"
        ran = "none ran" if self.confirmed is None else f"{self.confirmed} ran"
        failed = "" if self.refused is None else f", {self.refused} did not"
        return f"{ran}{failed} (predicted {self.predicted})"


def find_fit(rows: Rows, side: str, budget: float, most: int, *, enforce: bool) -> Fit:
    """Predict from one and two layers, then try."""
    fit = Fit()
    one, two = rows.known.get((side, 1)), rows.known.get((side, 2))
    if one is None or one["outcome"] == "failed":
        return fit
    if one["outcome"] == "out of memory":
        return Fit(0, 0, 1)
    if two is None or two["outcome"] == "failed":
        return fit
    if two["outcome"] == "out of memory":
        return Fit(1, 1, 2)
    each = max(1, two["peak_bytes"] - one["peak_bytes"])
    fit.predicted = min(most, max(2, int((budget - one["peak_bytes"]) / each) + 1))
    layers = fit.predicted
    while True:
        row = rows.get(side, layers, timed=1, budget=budget if enforce else None)
        if row is None or row["outcome"] == "failed":
            return fit
        if row["outcome"] == "ok":
            fit.confirmed = layers
            layers += 1
        else:
            fit.refused = layers
            layers -= 1
        known = (fit.confirmed is not None and fit.refused is not None) or layers > most
        if known or layers < 1:
            return fit


def print_table(rows: Rows, sides: tuple[str, ...], fits: dict[str, Fit], budget: float) -> None:
    settings = rows.settings
    groups = f"{settings.group_size}-row groups" if settings.group_size else "one LUT a weight"
    table = Table(
        "side", "step ms", "peak GiB, 1 layer", "each further", "saved MiB", "layers that fit",
        title=f"LLaMA-7B decoder layer{' (SMALL shape)' if settings.small else ''}, {settings.bits} bits, {groups}, "
        f"{settings.iterations} iteration(s), {settings.context} tokens, {settings.weights} weights, "
        f"{'AdamW' if settings.optimizer else 'no optimizer'}; {budget / GIB:.1f} GiB",
    )  # fmt: skip
    plain = rows.known.get(("plain", 1), {}).get("saved_bytes")
    for side in sides:
        one, two = rows.known.get((side, 1)), rows.known.get((side, 2))
        if one is None or one["outcome"] != "ok":
            outcome = "NOT RUN" if one is None else one["outcome"]
            table.add_row(side, outcome, "", "", "", str(fits.get(side, "")))
            continue
        extra = f"{(one['saved_bytes'] - plain) / MIB:.3f}" if plain is not None else "-"
        if plain is not None and "saved_sharded_bytes" in one:
            extra += f" ({(one['saved_sharded_bytes'] - plain) / MIB:.3f} with S)"
        further = "-"
        if two is not None and two["outcome"] == "ok":
            further = f"{(two['peak_bytes'] - one['peak_bytes']) / GIB:.3f}"
        peak = f"{one['peak_bytes'] / GIB:.3f}"
        table.add_row(side, f"{one['step_ms']:.2f}", peak, further, extra, str(fits.get(side, "")))
    Console(width=140).print(table)


@click.command(help=__doc__)
@click.option("--rows", "path", type=click.Path(path_type=Path), default=Path("llama-layers.jsonl"))
@click.option("--sides", multiple=True, type=click.Choice(SIDES), default=SIDES)
@click.option("--bits", default=3, show_default=True)
@click.option("--group-size", default=16, show_default=True, help="Rows that share a LUT; 0: one a weight.")
@click.option("--iterations", default=1, show_default=True)
@click.option("--context", default=2048, show_default=True)
@click.option(
    "--weights", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True,
    help="Of the trained weights; the trainer holds float32 masters.",
)  # fmt: skip
@click.option("--optimizer/--no-optimizer", default=True)
@click.option("--checkpointing/--keep-activations", default=False)
@click.option("--learners", default=8, show_default=True, help="Learners that S shards over.")
@click.option("--fit/--no-fit", default=True, help="Find out how many layers fit.")
@click.option("--most", default=64, show_default=True, help="Layers that are tried at most.")
@click.option("--budget-gib", type=float, help="Memory to fit into.  [default: what is free on the GPU]")
@click.option("--minutes", default=9.5, show_default=True, help="Start nothing new after this time.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]))
@click.option("--small", is_flag=True, help="A tiny shape, to try the script.")
@click.option("--worker", "task", hidden=True)
def main(
    path: Path, sides: tuple[str, ...], fit: bool, most: int, budget_gib: float | None, minutes: float,
    device: str | None, task: str | None, **settings: Any,
) -> None:  # fmt: skip
    if task is not None:
        side, layers, given, timed = json.loads(task)
        worker(side, layers, Settings(**given), timed)
        return
    deadline = time.monotonic() + minutes * 60
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = Rows(path, Settings(device=chosen, **settings), deadline)
    if budget_gib is not None:
        budget = budget_gib * GIB
    elif chosen == "cuda":
        free = subprocess.run(
            [sys.executable, "-c", "import torch; print(torch.cuda.mem_get_info()[0])"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        budget = float(free.stdout)
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {budget / GIB:.1f} GiB free")
    else:
        raise click.UsageError("on the CPU, say what to fit into with --budget-gib")
    for layers in (1, 2):
        for side in sides:
            rows.get(side, layers, timed=TIMED)
    fits = {}
    for side in sides:
        if fit:
            fits[side] = find_fit(rows, side, budget, most, enforce=budget_gib is not None)
    print_table(rows, sides, fits, budget)


if __name__ == "__main__":
    main()
