"""Step time and peak memory: palettized training against plain fine-tuning of the same model.

    python -m benchmarks.train_step                      # SmolLM2-135M's shape, random weights
    python -m benchmarks.train_step --model FOLDER

Both sides use the same batches, the same loss (next tokens, in chunks), the same fused AdamW and, on CUDA, bfloat16
autocast over float32 masters. Palettized steps are recorded as a CUDA graph, as `edkm-export train` does; plain ones
are run both ways. They alternate in fresh processes' worth of memory: each is built, warmed up, timed
and freed. Exit status 1 when the step is more than 15% slower or the peak more than 5% higher (CUDA only).
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from edkm_export.recipe import uniform_recipe
from edkm_export.reference.source import Source, load_model
from edkm_export.training.graphs import GraphedStep, can_record
from edkm_export.training.learner import Learner
from edkm_export.training.optimizer import build_optimizer, freeze
from edkm_export.training.palettized.batch import ClusterBatch
from edkm_export.training.palettized.clusters import ClusterMethod
from edkm_export.training.palettized.surgery import attach, clusters_of, insert_clusters
from edkm_export.training.train_config import TrainConfig

SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
SLOWER, LARGER = 0.15, 0.05


@dataclass(frozen=True)
class Found:
    """Median and spread of the step in milliseconds, peak bytes, loss of the last step."""

    step_ms: float
    spread_ms: float
    peak_bytes: int
    loss: float


def make_model(reference: str | None, layers: int | None) -> Any:
    import transformers

    if reference is not None:
        return load_model(Source.parse(reference), torch.float32)
    torch.manual_seed(0)
    shape = {**SMOLLM2, **({} if layers is None else {"num_hidden_layers": layers})}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).float()


def measure(
    side: str,
    reference: str | None,
    config: TrainConfig,
    *,
    device: str,
    steps: int,
    layers: int | None,
    recorded: bool = True,
) -> Found:
    model = make_model(reference, layers).to(device)
    model.config.use_cache = False
    if side == "plain":
        model.requires_grad_(True)
        if not config.train_embedding:
            model.get_input_embeddings().requires_grad_(False)
            model.get_output_embeddings().requires_grad_(False)
    else:
        recipe = uniform_recipe(config.bits, config.group_size)
        method = ClusterMethod(config.backward, config.alpha, config.iterations)
        insert_clusters(model, recipe, method=method, in_bfloat16=config.bf16)
        freeze(model, config)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    learner = Learner(model, None, objective="cross-entropy")
    optimizer = build_optimizer(model, config)
    attach(model, optimizer)
    clusters = ClusterBatch(list(clusters_of(model).values()))
    clusters.defer()
    graph = None
    if recorded and can_record(learner):
        graph = GraphedStep(learner, divide=config.accumulate, bf16=config.bf16)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator(device=device).manual_seed(0)
    times: list[float] = []
    on_gpu = device == "cuda"
    if on_gpu:  # the peak is that of all steps, those before a recording and the recording itself included
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    loss = torch.zeros(())
    for step in range(-5, steps):
        ids = torch.randint(
            vocabulary, (config.batch_size, config.context), generator=generator, device=device
        )
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for part in ids.chunk(config.accumulate):
            if graph is not None:
                loss = graph(part)
                continue
            with torch.autocast(device, torch.bfloat16, enabled=config.bf16):
                loss = learner(part) / config.accumulate
            loss.backward()
        clusters.gradients()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        clusters.refresh()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        if step >= 0:
            times.append((time.perf_counter() - start) * 1e3)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    spread = statistics.quantiles(times, n=4)
    return Found(statistics.median(times), spread[2] - spread[0], peak, float(loss.detach()))


@click.command(help=__doc__)
@click.option("--model", help="Hugging Face folder or GGUF file instead of random weights.")
@click.option("--bits", default=3, show_default=True)
@click.option("--group-size", default=16, show_default=True)
@click.option(
    "--backward",
    type=click.Choice(["straight-through", "soft", "dkm"]),
    multiple=True,
    default=["straight-through"],
)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--context", default=1024, show_default=True)
@click.option("--accumulate", default=1, show_default=True)
@click.option("--steps", default=20, show_default=True)
@click.option("--rounds", default=2, show_default=True, help="How often the sides alternate.")
@click.option("--layers", type=int, help="Layers of the random model, to try it on a small machine.")
@click.option("--train-embedding/--freeze-embedding", default=True, show_default=True)
@click.option("--gradient-checkpointing", is_flag=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]))
@click.option("--profile", is_flag=True, help="Print the kernels of one palettized step.")
def main(model: str | None, backward: tuple[str, ...], rounds: int, steps: int, layers: int | None, device: str | None,
         profile: bool, **settings: Any) -> None:  # fmt: skip
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    config = TrainConfig(bf16=chosen == "cuda", **settings)
    if chosen == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        from edkm_export.training.palettized import tables

        print(f"{torch.cuda.get_device_name()}; kernels: {'Triton' if tables._triton() else 'plain torch'}")
    found: dict[str, list[Found]] = {}
    # Plain fine-tuning as everyone runs it, and recorded as a CUDA graph, as our trainer runs palettized models.
    sides = ["plain", *(["plain, recorded"] if chosen == "cuda" else []), *backward]
    for _ in range(rounds):
        for side in sides:
            kind = side.split(",")[0]
            own = config if kind == "plain" else config.updated({"backward": kind})
            found.setdefault(side, []).append(
                measure(kind, model, own, device=chosen, steps=steps, layers=layers, recorded=side != "plain")
            )
            gc.collect()
            if chosen == "cuda":
                torch.cuda.empty_cache()
    tokens = config.batch_size * config.context
    table = Table(
        "side",
        "step ms",
        "IQR",
        "tokens/s",
        "peak GiB",
        "slower",
        "more memory",
        title=f"{tokens:,} tokens a step",
    )
    base = min(found["plain"], key=lambda each: each.step_ms)
    ok = True
    summary = {}
    for side in sides:
        best = min(found[side], key=lambda each: each.step_ms)
        slower = best.step_ms / base.step_ms - 1
        larger = best.peak_bytes / base.peak_bytes - 1 if base.peak_bytes else 0.0
        table.add_row(side, f"{best.step_ms:.2f}", f"{best.spread_ms:.2f}", f"{tokens / best.step_ms * 1e3:,.0f}",
                      f"{best.peak_bytes / 2**30:.3f}", f"{slower:+.1%}", f"{larger:+.1%}")  # fmt: skip
        summary[side] = {
            "step_ms": [each.step_ms for each in found[side]],
            "peak_bytes": best.peak_bytes,
            "slower": slower,
            "more_memory": larger,
        }
        if side == "straight-through":
            ok = chosen != "cuda" or (slower <= SLOWER and larger <= LARGER)
    Console(width=120).print(table)
    print(json.dumps({"settings": settings, "device": chosen, "sides": summary}))
    if profile:
        print_profile(model, config, chosen, layers)
    sys.exit(0 if ok else 1)


def print_profile(model: str | None, config: TrainConfig, device: str, layers: int | None) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with record(activities=activities) as found:
        measure("palettized", model, config, device=device, steps=2, layers=layers)
    order = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))


if __name__ == "__main__":
    main()
