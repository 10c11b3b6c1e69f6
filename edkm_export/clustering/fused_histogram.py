"""The recurrence on the histogram of 16-bit weights, by fused kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from edkm_export.clustering.fused import LEAST, WARPS, Passes, bins_of, cores, kernels, room

__all__ = ["FusedHistogram"]

_TILE = 2048  # entries of an attention tile over bins: 16 a thread, which 4 warps hold in registers
_FLAT_BLOCK = 2048  # weights that a program counts or looks up
_WORTH_SAVING = 512  # the share of the weight that saved counts may take: 1 / 512
_COPIES = 64  # of the bins, at most, to count in at the same time


class _Bins:
    """The histogram of a 16-bit weight, and what is looked up in tables over its bins.

    Attributes:
        largest: largest magnitude pattern of each group, int32 [groups].
        counts: how many weights fall into each bin, int32 [groups, bins].
    """

    def __init__(self, weight: Tensor, known: tuple[Tensor, ...] = ()) -> None:
        """`known`: what `memory` gave earlier."""
        self.weight = weight
        self.groups, self.m = weight.shape
        self.number = bins_of(weight.dtype)
        self.kernels = kernels("histogram_kernels")
        if known:
            self.largest, self.counts = known
            return
        self.largest = torch.zeros(self.groups, dtype=torch.int32, device=weight.device)
        self._flat("find_largest", self.largest, windowed=False)
        self.counts = self._count()

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """What to save for the backward pass: the counts where they are next to nothing."""
        small = self.counts.nbytes * _WORTH_SAVING <= self.weight.nbytes
        return (self.largest, self.counts) if small else ()

    def _count(self) -> Tensor:
        copies = max(1, min(_COPIES, cores(self.weight.device) // self.groups))
        shape = (self.groups, copies, self.number)
        counts = torch.zeros(shape, dtype=torch.int32, device=self.weight.device)
        self._flat("count", self.largest, counts, copies=copies)
        return counts[:, 0] if copies == 1 else counts.sum(1, dtype=torch.int32)

    def look_up(self, table: Tensor, out: Tensor) -> None:
        """Entry of the table [groups, bins] for each weight."""
        self._flat("look_up", self.largest, table, out)

    def combine(self, grad: Tensor, own: Tensor, shared: Tensor, out: Tensor) -> None:
        """grad * own + shared, the tables looked up."""
        self._flat("combine", self.largest, grad, own, shared, out)

    def recurrence(self, name: str, *arguments: Any, width: int, **options: int) -> None:
        """Launch `settle` or `unsettle`, one program a group."""
        getattr(self.kernels, name)[(self.groups,)](
            *arguments, LEAST, HALF=self.number // 2, K=width, BLOCK=max(16, _TILE // width), num_warps=WARPS,
            **options,
        )  # fmt: skip

    def _flat(self, name: str, *tensors: Tensor, windowed: bool = True, copies: int | None = None) -> None:
        blocks = -(-self.m // _FLAT_BLOCK)
        sizes = (self.m, blocks) if copies is None else (self.m, blocks, copies)
        options = {"HALF": self.number // 2} if windowed else {}
        getattr(self.kernels, name)[(self.groups * blocks,)](
            self.weight, *tensors, *sizes, BLOCK=_FLAT_BLOCK, **options
        )


class FusedHistogram(torch.autograd.Function):
    """Soft weight and last centroids of 16-bit weights, by the recurrence on their histogram.

    apply(weight [groups, m], centroids float32 [groups, k], tau float32 [groups], iterations)
    -> (weight's dtype [groups, m], float32 [groups, k]). Saved are references to the weight and the
    temperature, the centroids and masses of each iteration, and the counts where the groups are large (32 KiB for
    bfloat16); otherwise these are counted again.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, weight: Tensor, centroids: Tensor, tau: Tensor, iterations: int
    ) -> tuple[Tensor, Tensor]:
        weight, tau = weight.contiguous(), tau.contiguous()
        groups, k = centroids.shape
        iterates, masses = room(centroids, iterations)
        soft = torch.empty_like(weight)
        with torch.cuda.device_of(weight):  # type: ignore[no-untyped-call]
            bins = _Bins(weight)
            table = weight.new_empty(groups, bins.number)
            bins.recurrence(
                "settle", bins.counts, bins.largest, tau, iterates, masses, table, iterations, groups, k,
                width=1 << (k - 1).bit_length(),
            )  # fmt: skip
            bins.look_up(table, soft)
        ctx.save_for_backward(weight, tau, iterates, masses, *bins.memory)
        return soft, iterates[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_soft: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        weight, tau, iterates, masses, *known = ctx.saved_tensors
        grad_soft, out = grad_soft.contiguous(), torch.empty_like(weight)
        gradients = torch.empty_like(iterates)
        gradients[-1] = grad_last
        with torch.cuda.device_of(weight):  # type: ignore[no-untyped-call]
            passes, bins = Passes(weight, tau, iterates.shape[2]), _Bins(weight, tuple(known))
            applied = passes.apply_sums(grad_soft, iterates, None)
            own, shared = (tau.new_empty(passes.groups, bins.number) for _ in range(2))
            bins.recurrence(
                "unsettle", weight, bins.counts, bins.largest, tau, iterates, masses, gradients, applied, own, shared,
                len(masses), passes.groups, passes.k, passes.parts, width=passes.width, ROWS=passes.rows,
            )  # fmt: skip
            bins.combine(grad_soft, own, shared, out)
        return out, gradients[0], None, None
