"""The recurrence on weights in float32, by passes of fused kernels, wherever the weights of a group lie."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from edkm_export.clustering.fused import Passes, room

__all__ = ["FusedStreaming", "FusedTrace", "Joined", "finish"]

_Result = TypeVar("_Result")
Joined = Generator[Tensor, Tensor, _Result]
"""A computation that yields the sums of a pass, and goes on with those over all weights, wherever these lie."""


def finish(computation: Joined[_Result]) -> _Result:
    """Run a computation whose weights are all here: sums stay as they are."""
    sums = next(computation)
    while True:
        try:
            sums = computation.send(sums)
        except StopIteration as end:
            found: _Result = end.value
            return found


class FusedTrace:
    """The recurrence of some weights, unrolled once; soft weights and gradients come from it without a second time.

    Attributes:
        weight: [groups, m], contiguous; must not change while the trace is used.
        tau: float32 [groups].
        iterates: c^0 ... c^T, float32 [T + 1, groups, k].
        masses: S^0 ... S^{T-1}, float32 [T, groups, k].
    """

    def __init__(self, weight: Tensor, tau: Tensor, iterates: Tensor, masses: Tensor) -> None:
        self.weight, self.tau, self.iterates, self.masses = weight, tau, iterates, masses
        self._sums: Tensor | None = None  # of the last pass

    @classmethod
    def unroll(cls, weight: Tensor, centroids: Tensor, tau: Tensor, iterations: int) -> Joined[FusedTrace]:
        """Iterate `iterations` times from c^0 = `centroids`, float32 [groups, k]."""
        made = cls(weight, tau, *room(centroids, iterations))
        passes = made._passes()
        before, sums = passes.sums(), passes.sums()
        for t in range(iterations):
            before, sums = sums, before
            passes.launch("iterate", tau, made.iterates, made.masses, before, sums, t)
            yield from _join(sums)
        passes.reduce("conclude", tau, made.iterates, made.masses, sums, iterations)
        made._sums = sums
        return made

    def _passes(self) -> Passes:
        return Passes(self.weight, self.tau, self.iterates.shape[2])

    @property
    def last(self) -> Tensor:
        """c^T, float32 [groups, k]."""
        return self.iterates[-1]

    def soften(self, out: Tensor) -> None:
        """Write the soft weight A^{T-1} c^T to `out` [groups, m], in its dtype."""
        assert self._sums is not None
        self._passes().launch(
            "soften", self.tau, self.iterates, self.masses, self._sums, out, len(self.masses)
        )

    def pull_back(self, grad_soft: Tensor, grad_last: Tensor | None, out: Tensor) -> Joined[Tensor]:
        """Gradient of the weight, G d + h, to `out`; returns the gradient of c^0 [groups, k].

        Args:
            grad_soft: of the soft weight, [groups, m], contiguous; may be `out`.
            grad_last: of c^T [groups, k]; None: zero.
            out: [groups, m].
        """
        tau, last = self.tau, len(self.masses)
        gradients = torch.empty_like(self.iterates)
        gradients[-1] = 0 if grad_last is None else grad_last
        collected = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        passes = self._passes()
        applied = passes.apply_sums(grad_soft, self.iterates, collected)
        yield from _join(applied)
        before, sums = passes.sums(), passes.sums()
        trace = (self.iterates, self.masses, gradients, applied)
        for t in range(last - 1, -1, -1):
            before, sums = sums, before
            target = out if t == 0 else collected
            passes.launch("pull_iteration", tau, *trace, before, sums, collected, target, t, last)
            yield from _join(sums)
        passes.reduce("close", tau, self.masses, gradients, applied, sums, last)
        return gradients[0]


def _join(sums: Tensor) -> Generator[Tensor, Tensor, None]:
    """Make the sums [groups, parts, 2, K] of a pass those over all weights, in place."""
    whole = yield sums
    if whole is not sums:
        sums.zero_()
        sums[:, 0] = whole  # [groups, 2, K]


class FusedStreaming(torch.autograd.Function):
    """Soft weight and last centroids, by passes over the weights.

    apply(weight [groups, m], centroids float32 [groups, k], tau float32 [groups], iterations)
    -> (weight's dtype [groups, m], float32 [groups, k]). The backward pass of a 16-bit weight takes a float32
    tensor of its shape meanwhile.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, weight: Tensor, centroids: Tensor, tau: Tensor, iterations: int
    ) -> tuple[Tensor, Tensor]:
        weight, tau = weight.contiguous(), tau.contiguous()
        soft = torch.empty_like(weight)
        with torch.cuda.device_of(weight):  # type: ignore[no-untyped-call]
            trace = finish(FusedTrace.unroll(weight, centroids, tau, iterations))
            trace.soften(soft)
        ctx.save_for_backward(weight, tau, trace.iterates, trace.masses)
        return soft, trace.last.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_soft: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        trace = FusedTrace(*ctx.saved_tensors)
        out = torch.empty_like(trace.weight)
        with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
            first = finish(trace.pull_back(grad_soft.contiguous(), grad_last, out))
        return out, first, None, None
