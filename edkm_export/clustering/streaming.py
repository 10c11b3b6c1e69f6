"""DKM that recomputes attention from weights and centroids, block by block, in both passes.

The idea of flash attention (arXiv 2205.14135) for the clustering of weights: for float32 masters, for many
small groups and for vectors, where values hardly repeat and a histogram gains nothing. Saved for backward: a
reference to the weight, and the centroids and masses of each iteration.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from edkm_export.clustering.recurrence import Points, Trace, apply, pull_back, unroll

__all__ = ["Streaming", "group_chunks"]

_CHUNK = 1 << 22  # weights whose gradient is held in the compute dtype at a time, if groups can be split so


def group_chunks(groups: int, group_entries: int, entries: int) -> Iterator[slice]:
    """Cut the groups into runs of about `entries` entries."""
    stride = max(1, entries // max(1, group_entries))
    for start in range(0, groups, stride):
        yield slice(start, min(start + stride, groups))


class Streaming(torch.autograd.Function):
    """Soft weight and last centroids.

    apply(weight [groups, m, dim], centroids [groups, k, dim] in the compute dtype, tau [groups] likewise,
    iterations or None for a fixed point) -> (weight's dtype [groups, m, dim], [groups, k, dim]).
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, weight: Tensor, centroids: Tensor, tau: Tensor, iterations: int | None
    ) -> tuple[Tensor, Tensor]:
        soft = torch.empty_like(weight)
        traces = []
        for some in group_chunks(len(weight), weight[0].numel(), _CHUNK):
            points = Points(weight[some], None, tau[some])
            trace = unroll(points, centroids[some], iterations)
            apply(points, trace, soft[some])
            traces.append(trace)
        iterates = torch.cat([trace.centroids for trace in traces], dim=1)
        ctx.save_for_backward(weight, tau, iterates, torch.cat([trace.masses for trace in traces], dim=1))
        ctx.implicit = iterations is None
        return soft, iterates[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_soft: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        weight, tau, iterates, masses = ctx.saved_tensors
        grad_weight, grad_first = torch.empty_like(weight), torch.empty_like(iterates[0])
        for some in group_chunks(len(weight), weight[0].numel(), _CHUNK):
            points = Points(weight[some], None, tau[some])
            in_place = weight.dtype == tau.dtype
            out = grad_weight[some].zero_() if in_place else tau.new_zeros(points.values.shape)
            grad_first[some] = pull_back(
                points,
                Trace(iterates[:, some], masses[:, some]),
                grad_soft[some],
                grad_last[some],
                out,
                implicit=ctx.implicit,
                through=True,
            )
            if not in_place:
                grad_weight[some] = out
        return grad_weight, grad_first, None, None
