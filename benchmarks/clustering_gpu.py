"""Time and peak memory of differentiable clustering on a CUDA device, forward and backward.

    python -m benchmarks.clustering_gpu --size 4096 --iterations 5

Compares dense autograd, plain torch on the histogram or block by block, and the fused kernels, for one table a
matrix and for one each 16 rows. Times are medians of CUDA events around forward and backward together, launched one
by one and, for the fused kernels, as a recorded CUDA graph, as the trainer runs them: what the GPU itself takes. The
peak is above weight, upstream gradient and centroids.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from edkm_export.clustering import optimal_centroids, scale_free_temperature
from edkm_export.clustering.dense import cluster_dense
from edkm_export.clustering.fused_histogram import FusedHistogram
from edkm_export.clustering.fused_trace import FusedStreaming
from edkm_export.clustering.histogram import Histogram
from edkm_export.clustering.streaming import Streaming

Forward = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def dense(weight: Tensor, centroids: Tensor, tau: Tensor, steps: int) -> Tensor:
    soft, _ = cluster_dense(
        weight[..., None], centroids[..., None].to(weight.dtype), tau.to(weight.dtype), steps
    )
    return soft[..., 0]


def methods(dtype: torch.dtype) -> dict[str, Forward]:
    """Those that suit the problem."""
    found: dict[str, Forward] = {
        "dense": dense,
        "torch streaming": lambda w, c, tau, t: Streaming.apply(w[..., None], c[..., None], tau, t)[0][
            ..., 0
        ],
        "fused streaming": lambda w, c, tau, t: FusedStreaming.apply(w, c, tau, t)[0],
    }
    if dtype == torch.bfloat16:
        found["torch histogram"] = lambda w, c, tau, t: Histogram.apply(w, c, tau, t)[0]
        found["fused histogram"] = lambda w, c, tau, t: FusedHistogram.apply(w, c, tau, t)[0]
    return found


def measure(
    forward: Forward,
    inputs: tuple[Tensor, Tensor, Tensor],
    upstream: Tensor,
    options: argparse.Namespace,
    *,
    record: bool,
) -> tuple[float, float | None, float, Tensor]:
    """Median milliseconds, those of a recorded graph or None, peak MiB, and the gradient of the weight."""
    weight, centroids, tau = inputs

    def run() -> None:
        weight.grad = centroids.grad = None
        forward(weight, centroids, tau, options.iterations).backward(upstream)

    for _ in range(3):
        run()
    gradient = weight.grad
    weight.grad = centroids.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    recorded = None
    if record:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        recorded = timed(graph.replay, options.repeats)
        weight.grad = centroids.grad = None
    return timed(run, options.repeats), recorded, peak / 2**20, gradient


def timed(run: Callable[[], None], repeats: int) -> float:
    """Median milliseconds."""
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--group-rows", type=int, nargs="+", default=[0, 16], help="0: one table for all")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print(f"{options.size}x{options.size}, {options.iterations} iterations, forward and backward")
    columns = f"{'ms':>10}{'recorded':>10}{'peak MiB':>10}{'difference':>12}"
    print(f"{'dtype':<10}{'bits':>5}{'rows':>6}  {'method':<18}{columns}")
    for dtype in (torch.bfloat16, torch.float32):
        for rows in options.group_rows:
            for bits in options.bits:
                torch.manual_seed(0)
                flat = (torch.randn(options.size, options.size) * 0.02).to(dtype)
                flat = flat.view(options.size // (rows or options.size), -1)
                # Seeds need not be optimal here: those of a part of each group will do.
                seeds, error = optimal_centroids(flat[:, : 1 << 16], 1 << bits)
                tau = scale_free_temperature(flat[:, : 1 << 16], 1 << bits, error=error).float().cuda()
                weight = flat.cuda().requires_grad_()
                centroids = seeds.float().cuda().requires_grad_()
                upstream = torch.randn_like(weight)
                reference: Tensor | None = None
                for name, forward in methods(dtype).items():
                    label = f"{str(dtype)[6:]:<10}{bits:>5}{rows:>6}  {name:<18}"
                    try:
                        ms, recorded, peak, gradient = measure(
                            forward,
                            (weight, centroids, tau),
                            upstream,
                            options,
                            record=name.startswith("fused"),
                        )
                    except torch.cuda.OutOfMemoryError:
                        print(f"{label}{'out of memory':>20}", flush=True)
                        continue
                    if name == "torch streaming":
                        reference = gradient.float()
                    off = "-" if reference is None else f"{_difference(gradient.float(), reference):.1e}"
                    replay = "-" if recorded is None else f"{recorded:.3f}"
                    print(f"{label}{ms:>10.3f}{replay:>10}{peak:>10.0f}{off:>12}", flush=True)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference of the weight's gradient from that of plain torch streaming, relative to the largest."""
    return float((found - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    main()
