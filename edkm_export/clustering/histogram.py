"""DKM on the histogram of each group: the weight's own bits are the index list.

A bfloat16 weight matrix holds a few thousand distinct values, so that the recurrence and its gradient run on
a table of these; the 16.8M weights of a 4096x4096 matrix are touched once to count them and once to look up
the result. Saved for backward: a reference to the weight, and the centroids and masses of each iteration; the
histogram is counted again. eDKM (arXiv 2309.00964, section 2.2) keeps an index list for the same purpose, of
2 bytes a weight.

The gradient of weight i of value u is G_i d_u + h_u: its own upstream gradient G_i through the table at fixed
centroids, and what it receives through the centroids, which is the same for equal weights.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from edkm_export.clustering.patterns import HostPatterns, Patterns
from edkm_export.clustering.recurrence import Points, Trace, apply, pull_back, slope, unroll
from edkm_export.clustering.streaming import group_chunks

__all__ = ["Histogram"]

# Groups are handled together up to this many bins, to bound the tables (12 bytes a bin while counting).
_BINS = 1 << 20


class Table(Protocol):
    """Distinct values of some groups; rows are padded with values of count 0."""

    values: Tensor  # [groups, U] in the compute dtype
    counts: Tensor  # [groups, U] likewise

    def look_up(self, table: Tensor, out: Tensor) -> None:
        """Write the table's entry [groups, U] of each weight to `out` [groups, m], in its dtype."""

    def sums(self, grad: Tensor) -> Tensor:
        """Sum the gradient [groups, m] over the weights of each value: [groups, U]."""

    def combine(self, grad: Tensor, factor: Tensor, term: Tensor, out: Tensor) -> None:
        """Write `grad * factor + term` to `out` [groups, m], the tables [groups, U] looked up."""


class SortedValues:
    """Distinct values by sorting, for wider dtypes. Needs an index of 8 bytes a weight while it lives."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        found = [torch.unique(row, return_inverse=True, return_counts=True) for row in weight]
        size = max(len(values) for values, _, _ in found)
        self.index = torch.stack([inverse for _, inverse, _ in found])
        self.values = torch.zeros(len(weight), size, dtype=dtype, device=weight.device)
        self.counts = torch.zeros_like(self.values)
        for group, (values, _, counts) in enumerate(found):
            self.values[group, : len(values)] = values
            self.counts[group, : len(values)] = counts

    def look_up(self, table: Tensor, out: Tensor) -> None:
        out.copy_(table.gather(1, self.index))

    def sums(self, grad: Tensor) -> Tensor:
        return torch.zeros_like(self.values).scatter_add_(1, self.index, grad.to(self.values.dtype))

    def combine(self, grad: Tensor, factor: Tensor, term: Tensor, out: Tensor) -> None:
        out.copy_(grad * factor.gather(1, self.index) + term.gather(1, self.index))


def _count(weight: Tensor, dtype: torch.dtype) -> Table:
    if weight.element_size() != 2:
        return SortedValues(weight, dtype)
    return HostPatterns(weight, dtype) if weight.device.type == "cpu" else Patterns(weight, dtype)


class Histogram(torch.autograd.Function):
    """Soft weight and last centroids.

    apply(weight [groups, m], centroids [groups, k] in the compute dtype, tau [groups] likewise, iterations or
    None for a fixed point) -> (weight's dtype [groups, m], [groups, k]).
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, weight: Tensor, centroids: Tensor, tau: Tensor, iterations: int | None
    ) -> tuple[Tensor, Tensor]:
        weight = weight.contiguous()
        soft = torch.empty_like(weight)
        traces = []
        for some in group_chunks(len(weight), 1 << 16, _BINS):
            table = _count(weight[some], tau.dtype)
            points = Points(table.values[..., None], table.counts, tau[some])
            trace = unroll(points, centroids[some, :, None], iterations)
            entries = torch.empty_like(points.values)
            apply(points, trace, entries)
            table.look_up(entries[..., 0], soft[some])
            traces.append(trace)
        iterates = torch.cat([trace.centroids for trace in traces], dim=1)
        ctx.save_for_backward(weight, tau, iterates, torch.cat([trace.masses for trace in traces], dim=1))
        ctx.implicit = iterations is None
        return soft, iterates[-1, ..., 0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_soft: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        weight, tau, iterates, masses = ctx.saved_tensors
        grad_soft = grad_soft.contiguous()
        grad_weight, grad_first = torch.empty_like(weight), torch.empty_like(iterates[0, ..., 0])
        for some in group_chunks(len(weight), 1 << 16, _BINS):
            table = _count(weight[some], tau.dtype)
            points = Points(table.values[..., None], table.counts, tau[some])
            trace = Trace(iterates[:, some], masses[:, some])
            shared = torch.zeros_like(points.values)
            grad_centroids = pull_back(
                points,
                trace,
                table.sums(grad_soft[some])[..., None],
                grad_last[some, :, None],
                shared,
                implicit=ctx.implicit,
                through=False,
            )
            table.combine(grad_soft[some], slope(points, trace), shared[..., 0], grad_weight[some])
            grad_first[some] = grad_centroids[..., 0]
        return grad_weight, grad_first, None, None
