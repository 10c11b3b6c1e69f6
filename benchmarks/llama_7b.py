"""Training steps of a whole LLaMA-7B: plain fine-tuning beside each way to train it palettized, in one process group.

    torchrun --nproc-per-node 2 -m benchmarks.llama_7b --windows 1 --windows 4 --rows rows.jsonl
    python -m benchmarks.llama_7b --sides distillation,straight-through                      # one GPU
    torchrun --nproc-per-node 2 -m benchmarks.llama_7b --device cpu --layers 2 --small       # to try the script

Weights are random (or those of --model), since time and memory do not depend on them. Sides:

    cross-entropy      plain fine-tuning: FSDP2, float32 master weights, bfloat16 products, fused AdamW
    distillation       the same with the loss of palettized training: KL to a frozen copy in bfloat16
    straight-through   palettized: indices and LUTs, distillation
    soft, dkm          likewise, with the exact gradient of soft k-means; soft k-means in both passes

All sides checkpoint activations. Palettized sides take --bits, --group-size and --iterations (the `paper` preset's by
default), and run the code of `edkm-export train`: its learner, its sharding, its optimizer. A step is taken apart by
events on the device: "teacher" (forward pass of the original), "forward" (of the student, loss included), "backward",
"clusters" (gradients of LUTs and through soft k-means, the norm of all gradients), "optimizer", "assign".

MFU counts 6 operations a weight and token for the student, 2 for the original, and attention, against --peak.
"""

from __future__ import annotations

import copy
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

from benchmarks.llama_stack import LLAMA_7B, SMALL
from edkm_export.training.distributed.processes import Processes
from edkm_export.training.distributed.sharding import Sharding
from edkm_export.training.learner import Learner, hold_in_bfloat16
from edkm_export.training.optimizer import build_optimizer, freeze
from edkm_export.training.palettized.batch import ClusterBatch
from edkm_export.training.palettized.surgery import attach, clusters_of, seed_centroids
from edkm_export.training.preparation import base_recipe, insert
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


def make_model(layers: int, small: bool, device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    shape: dict[str, Any] = SMALL if small else LLAMA_7B
    config = LlamaConfig(
        **shape,
        num_hidden_layers=layers,
        vocab_size=512 if small else 32000,
        attn_implementation="sdpa",
        tie_word_embeddings=False,
        dtype=torch.float32,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0.0, 0.02, generator=generator)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)  # its tables are no parameters
    return model


def shared_seeds(model: Any, config: TrainConfig) -> dict[tuple[str, int], Tensor]:
    """Centroids of one weight of each shape, for all of that shape: these are random, and steps take as long."""
    recipe, found, known = base_recipe(config), {}, {}
    shapes = {name: module for name, module in model.named_modules() if hasattr(module, "weight")}
    for name, rule in recipe.plan(
        {name: tuple(module.weight.shape) for name, module in shapes.items() if module.weight.dim() == 2},
        "model",
    ).items():
        weight = shapes[name].weight
        kind = (tuple(weight.shape), rule)
        if kind not in known:
            known[kind] = seed_centroids(weight, rule)[0]
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

    model = make_model(layers, small, processes.device)
    teacher = None if side == "cross-entropy" else copy.deepcopy(model).requires_grad_(False).eval()
    lap("make")
    config = config.updated({"backward": side} if side not in PLAIN else {"train_embedding": True})
    if side in PLAIN:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if teacher is not None:
            teacher.to(torch.bfloat16)
        learner = Learner(model, teacher, objective="cross-entropy" if teacher is None else "distillation")
        if processes.are_many:
            shard_plain(learner, processes)
        optimizer = torch.optim.AdamW(
            learner.parameters(), lr=1e-6, weight_decay=0.0, fused=processes.device.startswith("cuda")
        )
        lap("shard")
        return Side(learner, optimizer, ClusterBatch([]), None, built)
    insert(
        model,
        base_recipe(config),
        config,
        seeds=shared_seeds(model, config),
        source="LLaMA-7B",
    )
    freeze(model, config)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lap("palettize")
    hold_in_bfloat16(teacher)
    learner = Learner(model, teacher, objective="distillation")
    learner.train()
    optimizer = build_optimizer(model, config)
    sharding = None
    if processes.are_many:
        sharding = Sharding(learner, teacher, optimizer, processes)
    else:
        attach(model, optimizer)
    batch = ClusterBatch(list(clusters_of(learner).values()))
    batch.defer()
    lap("shard")
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


@click.command(help=__doc__)
@click.option("--sides", default=",".join(SIDES), show_default=True, help="Comma-separated.")
@click.option("--windows", multiple=True, default=(1,), show_default=True, help="Of a GPU and step.")
@click.option("--context", default=2048, show_default=True, help="Tokens of a window.")
@click.option("--layers", default=32, show_default=True)
@click.option("--bits", default=PRESETS["paper"].bits, show_default=True)
@click.option("--group-size", default=PRESETS["paper"].group_size, show_default=True)
@click.option("--iterations", default=PRESETS["paper"].iterations, show_default=True)
@click.option("--steps", default=4, show_default=True, help="That are timed, after two.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="Default: cuda if there is one.")
@click.option(
    "--peak", default=989e12, show_default=True, help="Dense bfloat16 operations a second of a GPU."
)
@click.option("--profile", is_flag=True, help="Print the kernels of one more step.")
@click.option("--small", is_flag=True, help="A tiny shape, to try the script.")
@click.option("--rows", type=click.Path(path_type=Path), help="Append each row here as a line of JSON.")
def main(sides: str, windows: tuple[int, ...], device: str | None, rows: Path | None, **options: Any) -> None:
    config = PRESETS["paper"].updated(
        {
            "bits": options["bits"],
            "group_size": options["group_size"],
            "iterations": options["iterations"],
            "bf16": True,
            "train_embedding": False,
            "context": options["context"],
        }
    )
    with Processes.join(device) as processes:
        for side in sides.split(","):
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
            gc.collect()
            if processes.device.startswith("cuda"):
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
