"""Training steps of a whole LLaMA-7B: plain fine-tuning beside each way to train it palettized, in one process group.

    torchrun --nproc-per-node 2 -m benchmarks.llama_7b --windows 1 --windows 4 --rows rows.jsonl
    python -m benchmarks.llama_7b --sides distillation,straight-through                      # one GPU
    torchrun --nproc-per-node 2 -m benchmarks.llama_7b --device cpu --layers 2 --small       # to try the script

Weights are random (or those of --model), since time and memory do not depend on them. Sides:

    cross-entropy      plain fine-tuning: FSDP2, float32 master weights, bfloat16 products, fused AdamW
    distillation       the same with the loss of palettized training: KL to a frozen copy in bfloat16
    straight-through   palettized: indices and LUTs, distillation
    soft, dkm          likewise, with the exact gradient of soft k-means; soft k-means in both passes

--command FOLDER runs the whole command before, and prints what its stages take. --moments, --masters and --gpu-memory
show whether a model trains on a smaller GPU.

All sides checkpoint activations. Palettized sides take --bits, --group-size and --iterations (the `paper` preset's by
default), and run the code of `edkm-export train`: its learner, its sharding, its optimizer. A step is taken apart by
events on the device: "teacher" (forward pass of the original), "forward" (of the student, loss included), "backward",
"clusters" (gradients of LUTs and through soft k-means, the norm of all gradients), "optimizer", "assign".

MFU counts 6 operations a weight and token for the student, 2 for the original, and attention, against --peak.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.llama_7b_command import time_command
from benchmarks.llama_7b_model import random_weights
from edkm_export.reference.float_weights import FloatWeights
from edkm_export.training.distributed.processes import Processes
from edkm_export.training.distributed.sharding import Sharding
from edkm_export.training.learner import Learner
from edkm_export.training.models import Models
from edkm_export.training.optimizer import build_optimizer, freeze
from edkm_export.training.palettized.batch import ClusterBatch
from edkm_export.training.palettized.surgery import attach, clusters_of, seed_centroids, trainable_shapes
from edkm_export.training.preparation import base_recipe
from edkm_export.training.train_config import PRESETS, TrainConfig

PLAIN = ("cross-entropy", "distillation")
SIDES = (*PLAIN, "straight-through", "soft", "dkm")
PARTS = ("teacher", "forward", "backward", "clusters", "optimizer", "assign")
GIB = 2**30


class Stopwatch:
    """Sums the time between marks by name, on the device's own clock where it has one."""

    def __init__(self, device: str) -> None:
        self.on_cuda = device.startswith("cuda")
        self.spans: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what the block does."""
        start = self._now()
        yield
        self.spans.append((name, start, self._now()))

    def take(self) -> dict[str, float]:
        """Milliseconds by name since the last call; a part within another is taken off it."""
        if self.on_cuda:
            torch.cuda.synchronize()
        found: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        for name, start, end in self.spans:
            found[name] += start.elapsed_time(end) if self.on_cuda else 1e3 * (end - start)
        self.spans.clear()
        found["forward"] -= found["teacher"]
        return found


@dataclass
class Side:
    """What one row of the table runs.

    Attributes:
        learner: student and loss.
        optimizer: of its parameters.
        batch: all clusters; empty for plain sides.
        sharding: None in one process, and for plain sides, which FSDP2 cuts by itself.
        built_s: seconds of each stage before the first step.
    """

    learner: Learner
    optimizer: torch.optim.Optimizer
    batch: ClusterBatch
    sharding: Sharding | None
    built_s: dict[str, float] = field(default_factory=dict)

    def step(self, ids: Tensor, watch: Stopwatch, device: str, limit: float) -> Tensor:
        """One optimizer step on windows [windows, context]; the loss."""
        with watch.part("forward"), torch.autocast(device.partition(":")[0], torch.bfloat16):
            loss: Tensor = self.learner(ids)
        with watch.part("backward"):
            loss.backward()
        with watch.part("clusters"):
            self.batch.gradients()
            if self.sharding is not None:
                self.sharding.finish_gradients(self.batch)
                self.sharding.clip_gradients(limit)
            else:
                torch.nn.utils.clip_grad_norm_(self.learner.parameters(), limit)
        with watch.part("optimizer"):
            self.optimizer.step()
        with watch.part("assign"):
            self.batch.refresh()
        self.optimizer.zero_grad()
        return loss.detach()


def shared_seeds(weights: FloatWeights, config: TrainConfig) -> dict[tuple[str, int], Tensor]:
    """Centroids of one weight of each shape, for all of that shape: these are random, and steps take as long."""
    found: dict[tuple[str, int], Tensor] = {}
    known: dict[Any, Tensor] = {}
    shapes = trainable_shapes(weights.model)
    for name, rule in base_recipe(config).plan(shapes, "model").items():
        kind = (shapes[name], rule)
        if kind not in known:
            known[kind] = seed_centroids(weights.held(name), rule)[0]
        found[name, rule.bits] = known[kind]
    return found


def shard_plain(learner: Learner, processes: Processes) -> None:
    """FSDP2 as its tutorial does it: each layer, then the rest; bfloat16 products, float32 reduction.

    Embedding and head of the original stay whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(processes.device.partition(":")[0], (processes.count,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in learner.model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(learner, mesh=mesh, mp_policy=policy)
    if learner.teacher is not None:
        for layer in learner.teacher.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)


def build(side: str, config: TrainConfig, layers: int, small: bool, processes: Processes) -> Side:
    built: dict[str, float] = {}
    start = time.monotonic()

    def lap(name: str) -> None:
        nonlocal start
        if processes.device.startswith("cuda"):
            torch.cuda.synchronize()
        built[name], start = time.monotonic() - start, time.monotonic()

    weights = random_weights(layers, small, processes.device)
    config = config.updated({"backward": side} if side not in PLAIN else {"train_embedding": True})
    if side in PLAIN:
        model = weights.load(processes.device).requires_grad_(True)
        teacher = None
        if side != "cross-entropy":
            teacher = dataclasses.replace(weights, dtype=torch.bfloat16).load(processes.device)
        lap("load")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        learner = Learner(model, teacher, objective="cross-entropy" if teacher is None else "distillation")
        if processes.are_many:
            shard_plain(learner, processes)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            learner.parameters(), lr=1e-6, weight_decay=0.0, fused=processes.device.startswith("cuda")
        )
        lap("shard")
        return Side(learner, optimizer, ClusterBatch([]), None, built)
    seeds = shared_seeds(weights, config)
    lap("cluster one of each shape")
    models = Models(weights, config, processes)
    teacher = models.original(in_bfloat16=True, changed=False)
    lap("load the original")
    model = models.student(base_recipe(config), seeds)
    freeze(model, config)
    lap("load and palettize the student")
    learner = Learner(model, teacher, objective="distillation")
    learner.train()
    sharding = None if models.shares is None else Sharding(learner, models.shares)
    optimizer = build_optimizer(model, config, models.sizes)
    attach(model, optimizer)
    batch = ClusterBatch(list(clusters_of(learner).values()))
    batch.defer()
    lap("the rest")
    return Side(learner, optimizer, batch, sharding, built)


def operations(model_config: Any, tokens: int, context: int, *, distills: bool) -> float:
    """Of a step: 6 a weight and token for the student (recomputation not counted), 2 for the original; attention."""
    hidden, inner, layers = (
        model_config.hidden_size,
        model_config.intermediate_size,
        model_config.num_hidden_layers,
    )
    weights = layers * (4 * hidden**2 + 3 * hidden * inner) + hidden * model_config.vocab_size
    attention = 2 * layers * hidden * context / 2 * 2  # causal: half of the square, two products
    forward = tokens * (2 * weights + attention)
    return forward * (4 if distills else 3)


def run_side(
    side: str, windows: list[int], config: TrainConfig, processes: Processes, options: dict[str, Any]
) -> list[dict[str, Any]]:
    on_cuda = processes.device.startswith("cuda")
    torch.manual_seed(0)
    made = build(side, config, options["layers"], options["small"], processes)
    teacher = made.learner.teacher
    watch = Stopwatch(processes.device)
    if teacher is not None:
        inner, known = teacher.base_model, teacher.base_model.forward

        def timed(*args: Any, **kwargs: Any) -> Any:
            with watch.part("teacher"):
                return known(*args, **kwargs)

        inner.forward = timed
    rows = []
    for count in windows:
        generator = torch.Generator().manual_seed(processes.rank)
        vocabulary = made.learner.config.vocab_size
        times, parts, losses = [], [], []
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        for index in range(-2, options["steps"]):
            ids = torch.randint(vocabulary, (count, options["context"]), generator=generator)
            ids = ids.to(processes.device)
            processes.wait()
            start = time.perf_counter()
            loss = made.step(ids, watch, processes.device, 1.0)
            found = watch.take()
            taken = 1e3 * (time.perf_counter() - start)
            losses.append(float(loss))
            if index >= 0:
                times.append(taken)
                parts.append(found)
        step_ms = statistics.median(times)
        tokens = count * options["context"]
        work = operations(made.learner.config, tokens, options["context"], distills=side != "cross-entropy")
        rows.append(
            {
                "side": side,
                "gpus": processes.count,
                "windows": count,
                "step_ms": step_ms,
                "spread_ms": max(times) - min(times),
                **{f"{name}_ms": statistics.median(each[name] for each in parts) for name in PARTS},
                "tokens_per_s": tokens * processes.count / step_ms * 1e3,
                "mfu": work / step_ms * 1e3 / options["peak"] if on_cuda else None,
                "peak_gib": torch.cuda.max_memory_allocated() / GIB if on_cuda else None,
                "built_s": made.built_s,
                "moments": config.moments,
                "masters": config.masters,
                "limit": options["gpu_memory"],
                "losses": losses,
            }
        )
        if options["profile"]:
            rows[-1]["profile"] = profiled(made, ids, watch, processes)
    return rows


def profiled(made: Side, ids: Tensor, watch: Stopwatch, processes: Processes) -> str:
    """The kernels that take most time in one step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        made.step(ids, watch, processes.device, 1.0)
        watch.take()
    key = "self_cuda_time_total" if processes.device.startswith("cuda") else "self_cpu_time_total"
    return str(found.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60))


def print_table(rows: list[dict[str, Any]]) -> None:
    heads = ["side", "GPUs", "windows", "step ms", *PARTS, "tokens/s", "MFU", "peak GiB", "last loss"]
    print("| " + " | ".join(heads) + " |\n|---|" + "---:|" * (len(heads) - 1))
    for row in rows:
        cells = [row["side"], str(row["gpus"]), str(row["windows"]), f"{row['step_ms']:.0f}"]
        cells += [f"{row[f'{name}_ms']:.0f}" for name in PARTS]
        cells += [
            f"{row['tokens_per_s']:,.0f}",
            "-" if row["mfu"] is None else f"{row['mfu']:.0%}",
            "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}",
            f"{row['losses'][-1]:.4f}",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


def parse_size(text: str) -> float:
    """Bytes of "80GB" or "79GiB"."""
    units = {"GB": 1e9, "GiB": float(GIB), "MB": 1e6}
    for unit, size in units.items():
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * size
    raise click.BadParameter(f"{text}: give a size such as 80GB")


def release(processes: Processes) -> None:
    gc.collect()
    if processes.device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@click.command(help=__doc__)
@click.option("--sides", default=",".join(SIDES), show_default=True, help="Comma-separated.")
@click.option("--windows", multiple=True, default=(1,), show_default=True, help="Of a GPU and step.")
@click.option("--context", default=2048, show_default=True, help="Tokens of a window.")
@click.option("--layers", default=32, show_default=True)
@click.option("--bits", default=PRESETS["paper"].bits, show_default=True)
@click.option("--group-size", default=PRESETS["paper"].group_size, show_default=True)
@click.option("--iterations", default=PRESETS["paper"].iterations, show_default=True)
@click.option("--steps", default=4, show_default=True, help="That are timed, after two.")
@click.option("--moments", type=click.Choice(["float32", "bfloat16", "8bit"]), default="float32")
@click.option("--masters", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option("--gpu-memory", help="Most that this process may take of a GPU, such as 80GB.")
@click.option(
    "--command",
    "folder",
    type=click.Path(path_type=Path),
    help="Run the whole command, too: a model of the shape is written to this folder, unless it holds one.",
)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="Default: cuda if there is one.")
@click.option(
    "--peak", default=989e12, show_default=True, help="Dense bfloat16 operations a second of a GPU."
)
@click.option("--profile", is_flag=True, help="Print the kernels of one more step.")
@click.option("--small", is_flag=True, help="A tiny shape, to try the script.")
@click.option("--rows", type=click.Path(path_type=Path), help="Append each row here as a line of JSON.")
def main(
    sides: str,
    windows: tuple[int, ...],
    device: str | None,
    folder: Path | None,
    rows: Path | None,
    **options: Any,
) -> None:
    config = PRESETS["paper"].updated(
        {
            "bits": options["bits"],
            "group_size": options["group_size"],
            "iterations": options["iterations"],
            "bf16": True,
            "train_embedding": False,
            "context": options["context"],
            "gradient_checkpointing": True,
            "backward": "straight-through",  # each side says which
            "moments": options["moments"],
            "masters": options["masters"],
        }
    )
    limit = parse_size(options["gpu_memory"]) if options["gpu_memory"] else None
    with Processes.join(device) as processes:
        if limit is not None and processes.device.startswith("cuda"):
            torch.cuda.set_per_process_memory_fraction(
                limit / torch.cuda.get_device_properties(processes.device).total_memory
            )
        if folder is not None:
            weights = random_weights(options["layers"], options["small"], processes.device)
            time_command(weights, folder, config, processes, rows)
            release(processes)
        for side in filter(None, sides.split(",")):
            try:
                found = run_side(side.strip(), list(windows), config, processes, options)
            except torch.OutOfMemoryError as error:
                found = []
                print(f"{side}: out of memory ({str(error).splitlines()[0][:120]})", flush=True)
            if processes.is_first and found:
                print_table(found)
                print(", ".join(f"{name} {taken:.1f} s" for name, taken in found[0]["built_s"].items()))
                for row in found:
                    print(row.pop("profile", ""), end="", flush=True)
                    if rows is not None:
                        with rows.open("a") as file:
                            file.write(json.dumps(row) + "\n")
            release(processes)


if __name__ == "__main__":
    main()
