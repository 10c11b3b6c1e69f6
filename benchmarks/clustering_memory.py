"""Memory and time of one differentiable clustering, forward and backward, by method.

    python -m benchmarks.clustering_memory --size 4096 --bits 3 --iterations 1

Prints for each method the bytes saved for backward (the weight itself excluded where it is only referred to),
the peak of resident memory above the inputs, and the best time of some runs. The soft weight and the gradient of
the weight are part of the peak: "kept" is the peak when the caller holds the soft weight through backward, so that
it is at least both; "freed" when the caller gives it up before, as our palettized modules do. Every row is measured
in a process of its own. `M`, `U` and `S` are the paper's marshaling, uniquification and sharding (eDKM, arXiv
2309.00964, table 2) on dense bfloat16 autograd; `S` is what one of 8 learners holds, for which memory is counted
after the forward pass only. `coremltools` is its DKM with default settings and as many iterations, started at our
centroids.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from edkm_export.clustering import MarshaledTensors, optimal_centroids, scale_free_temperature, soft_cluster
from edkm_export.clustering.dense import cluster_dense

MIB = 2**20
MARSHALED = {
    "dense bf16": {"marshal": False, "uniquify": False},
    "dense bf16, M": {"marshal": True, "uniquify": False},
    "dense bf16, M+S": {"marshal": True, "uniquify": False, "shard": True},
    "dense bf16, M+U": {"marshal": True, "uniquify": True},
    "dense bf16, M+U+S": {"marshal": True, "uniquify": True, "shard": True},
}
METHODS = [*MARSHALED, "coremltools", "histogram", "streaming", "streaming float32"]
MISSING = 4  # exit status of a worker: a library that a row needs is not installed


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def saved_bytes(function: Any, weight: torch.Tensor) -> tuple[Any, int]:
    """Call the function and count the distinct storages that autograd saves, the weight's excluded."""
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    seen.pop(weight.untyped_storage().data_ptr(), None)
    return result, sum(seen.values())


def coremltools_layer(weight: torch.Tensor, seeds: torch.Tensor, options: argparse.Namespace) -> Any:
    """coremltools' function of the weight, started at our centroids: its own search takes a quarter of an hour."""
    from coremltools.optimize.torch.palettization import (
        DKMPalettizer,
        DKMPalettizerConfig,
        ModuleDKMPalettizerConfig,
    )

    layer = torch.nn.Linear(options.size, options.size, bias=False)
    layer.weight = torch.nn.Parameter(weight.detach().view(options.size, options.size))
    groups = {"granularity": "per_grouped_channel", "group_size": options.group_rows}
    settings = ModuleDKMPalettizerConfig(
        n_bits=options.bits, kmeans_max_iter=options.iterations, weight_threshold=0, milestone=0,
        **(groups if options.group_rows else {"granularity": "per_tensor"}),
    )  # fmt: skip
    palettizer = DKMPalettizer(torch.nn.Sequential(layer), DKMPalettizerConfig(global_config=settings))
    (made,) = palettizer.prepare().train()
    palettizer.step()
    cluster = made.weight_fake_quant
    assert cluster.palett_max_mem == 1.0  # it installs no hooks of its own
    with torch.no_grad():
        cluster.create_partitions(made.weight)
        assert len(cluster.partitions) == len(cluster.centroids) == len(seeds)
        cluster.centroids = [row[:, None].to(weight.dtype) for row in seeds]
        cluster(made.weight)

    def forward() -> torch.Tensor:
        # Its hooks, which return what they are given, would hide the saved tensors from ours.
        with mock.patch("torch.autograd.graph.saved_tensors_hooks", lambda *_: nullcontext()):
            soft: torch.Tensor = cluster(weight.view(options.size, options.size)).view_as(weight)
        return soft

    return forward


def measure(method: str, options: argparse.Namespace) -> dict[str, float | None]:
    """One row: saved_bytes, peak_bytes, forward_ms, backward_ms."""
    torch.manual_seed(0)
    dtype = torch.float32 if method.endswith("float32") else torch.bfloat16
    shape = (options.size // (options.group_rows or options.size), -1)
    weight = (torch.randn(options.size, options.size) * 0.02).to(dtype).view(shape).requires_grad_()
    seeds, error = optimal_centroids(weight.detach(), 1 << options.bits)
    tau = scale_free_temperature(weight, 1 << options.bits, error=error).float()
    upstream = torch.ones_like(weight)
    settings = MARSHALED.get(method)
    centroids = (seeds if settings is None else seeds[..., None]).to(
        torch.float32 if settings is None else dtype
    )
    centroids.requires_grad_()
    theirs = coremltools_layer(weight, seeds, options) if method == "coremltools" else None
    group = None
    if settings is not None and settings.get("shard"):
        from torch.testing._internal.distributed.fake_pg import FakeStore

        if not dist.is_initialized():
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=options.learners)
        group = dist.group.WORLD

    best: dict[str, float | None] = {}
    for _ in range(options.repeats):
        weight.grad = centroids.grad = None
        context: Any = nullcontext()
        if settings is not None:
            context = MarshaledTensors(
                weight, marshal=settings["marshal"], uniquify=settings["uniquify"], process_group=group
            )

        def forward(context: Any = context) -> torch.Tensor:
            if theirs is not None:
                made: torch.Tensor = theirs()
                return made
            if settings is None:
                name = method.split()[0]
                return soft_cluster(
                    weight, centroids, temperature=tau, iterations=options.iterations, method=name
                )[0]
            with context:
                soft, _ = cluster_dense(weight[..., None], centroids, tau.to(dtype), options.iterations)
            return soft.view_as(weight)

        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident("VmRSS:")
        start = time.perf_counter()
        if settings is None:
            soft, saved = saved_bytes(forward, weight)
        else:
            soft = forward()
            saved = context.size_bytes
        middle = time.perf_counter()
        row: dict[str, float | None] = {"saved_bytes": saved, "forward_ms": (middle - start) * 1e3}
        row["peak_bytes"] = row["backward_ms"] = None
        if group is None:
            edge = torch.autograd.graph.get_gradient_edge(soft)
            if options.free_result:
                del soft
            torch.autograd.backward(edge, upstream)
            row["backward_ms"] = (time.perf_counter() - middle) * 1e3
            row["peak_bytes"] = resident("VmHWM:") - before
        if not best:
            best = row  # the first run has the honest peak: later ones find memory that was not given back
        for key in ("forward_ms", "backward_ms"):
            old, new = best[key], row[key]
            best[key] = new if old is None or new is None else min(old, new)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=1)
    parser.add_argument("--group-rows", type=int, default=0, help="rows that share a table; 0 for all")
    parser.add_argument("--learners", type=int, default=8, help="learners of S")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--free-result", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        small = argparse.Namespace(**{**vars(options), "size": max(256, options.group_rows), "repeats": 1})
        try:
            measure(options.methods[0], small)  # compilation and libraries take memory once
        except ImportError as error:
            print(error, file=sys.stderr)
            sys.exit(MISSING)
        print(json.dumps(measure(options.methods[0], options)))
        return
    print(
        f"{options.size}x{options.size}, {options.bits} bits, {options.iterations} iterations, "
        f"{options.group_rows or options.size} rows a group, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    heads = ("saved MiB", "peak, kept", "peak, freed", "forward ms", "backward ms")
    print(f"{'method':<20}" + "".join(f"{head:>13}" for head in heads))
    given = sys.argv[1 : sys.argv.index("--methods")] if "--methods" in sys.argv else sys.argv[1:]
    for method in options.methods:
        row, freed = (run_worker(method, [*given, *extra]) for extra in ([], ["--free-result"]))
        if isinstance(row, str) or isinstance(freed, str):
            print(f"{method:<20}  {row if isinstance(row, str) else freed}")
            continue
        sizes = (row["saved_bytes"], row["peak_bytes"], freed["peak_bytes"])
        cells = ["-" if size is None else f"{size / MIB:.4g}" for size in sizes]
        cells += ["-" if row[key] is None else f"{row[key]:.4g}" for key in ("forward_ms", "backward_ms")]
        print(f"{method:<20}" + "".join(f"{cell:>13}" for cell in cells), flush=True)


def run_worker(method: str, given: list[str]) -> dict[str, Any] | str:
    """The row of a method, or why there is none."""
    command = [sys.executable, "-m", "benchmarks.clustering_memory", *given, "--worker", "--methods", method]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == MISSING:
        return f"NOT RUN: {done.stderr.strip().splitlines()[-1]}"
    if done.returncode:
        return f"failed: {done.stderr.strip().splitlines()[-1:]}"
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


if __name__ == "__main__":
    main()
