"""DKM on the GPU with fused kernels: one launch a pass, no attention in memory.

Same mathematics and same saved tensors as `histogram` and `streaming`, whose plain torch code remains the
fallback and the oracle.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from edkm_export.clustering.native import values_of_bits
from edkm_export.clustering.recurrence import least_mass

__all__ = ["Fused", "can_fuse"]

_PATTERNS = 1 << 16
_TILE = 4096  # entries of an attention tile: 16 a thread
_WARPS = 8
_FLAT_BLOCK = 1024  # weights a program looks up or counts
_LEAST = least_mass(torch.float32)


@cache
def _kernels() -> ModuleType | None:
    """The kernels, or None where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("edkm_export.clustering.kernels")


def can_fuse(weight: Tensor, centroids: Tensor, tau: Tensor, iterations: int | None) -> bool:
    """Tell whether `Fused` takes it: scalars on a CUDA device, float32 arithmetic, a given T, k <= 256."""
    return (
        weight.is_cuda
        and weight.dim() == 2
        and tau.dtype == torch.float32
        and iterations is not None
        and centroids.shape[1] <= 256
        and _kernels() is not None
    )


class _Passes:
    """The launches over one set of points: weights [groups, m], or the bins of a histogram [groups, 65536]."""

    def __init__(self, weight: Tensor, tau: Tensor, k: int, *, counted: bool) -> None:
        self.weight, self.tau, self.k, self.counted = weight, tau, k, counted
        self.points = self.counts = weight
        if counted:
            self.points = _pattern_values(weight.dtype, weight.device)
            self.counts = self.bins(torch.int32)
            self.flat("count", self.counts)
        self.groups, self.m = self.counts.shape
        self.width = 1 << (k - 1).bit_length()
        self.block = max(16, _TILE // self.width)
        blocks = -(-self.m // self.block)
        self.parts = max(1, min(-(-2 * _cores(weight.device) // self.groups), blocks))
        self.chunk = -(-blocks // self.parts) * self.block

    def bins(self, dtype: torch.dtype) -> Tensor:
        """Zeros [groups, 65536]."""
        return torch.zeros(len(self.weight), _PATTERNS, dtype=dtype, device=self.weight.device)

    def sums(self) -> Tensor:
        """Room for the partial sums of a pass."""
        return self.tau.new_empty(self.groups, self.parts, 2, self.width)

    def launch(self, name: str, *arguments: Tensor | int, reduces: bool = True) -> None:
        """Launch a pass over the points, with what its kernel takes between `counts` and `m`.

        `reduces`: it begins by adding up the sums of the pass before.
        """
        tail: tuple[float, ...] = (self.m, self.chunk, self.groups, self.k, self.parts)
        options: dict[str, Any] = {"COUNTED": self.counted, "K": self.width, "BLOCK": self.block}
        if reduces:
            tail, options["ROWS"] = (*tail, _LEAST), max(1, _TILE // self.width)
        if name == "step":
            options["FIRST"] = arguments[-1] == 0
        kernel = getattr(_kernels(), name)
        kernel[(self.groups * self.parts,)](
            self.points, self.counts, *arguments, *tail, **options, num_warps=_WARPS
        )  # fmt: skip

    def flat(self, name: str, *tensors: Tensor) -> None:
        """Launch a kernel over the patterns of all weights."""
        groups, m = self.weight.shape
        kernel = getattr(_kernels(), name)
        kernel[(-(-groups * m // _FLAT_BLOCK),)](
            self.weight.view(torch.int16), *tensors, groups * m, m, GROUPED=groups > 1, BLOCK=_FLAT_BLOCK
        )


@cache
def _cores(device: torch.device) -> int:
    """Multiprocessors; 1 for the CPU, where Triton's interpreter can run the kernels."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def _pattern_values(dtype: torch.dtype, device: torch.device) -> Tensor:
    return values_of_bits(dtype).to(device)


class Fused(torch.autograd.Function):
    """Soft weight and last centroids.

    apply(weight [groups, m], centroids float32 [groups, k], tau float32 [groups], iterations, counted)
    -> (weight's dtype [groups, m], float32 [groups, k]). With `counted` the recurrence runs on the histogram
    of 16-bit weights, which takes 0.75 MiB a group meanwhile.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, weight: Tensor, centroids: Tensor, tau: Tensor, iterations: int, counted: bool
    ) -> tuple[Tensor, Tensor]:
        weight, tau = weight.contiguous(), tau.contiguous()
        groups, k = centroids.shape
        steps = centroids.new_empty(iterations + 1, groups, k)
        masses = centroids.new_empty(iterations, groups, k)
        steps[0] = centroids
        soft = torch.empty_like(weight)
        with torch.cuda.device_of(weight):  # type: ignore[no-untyped-call]
            passes = _Passes(weight, tau, k, counted=counted)
            before, sums = passes.sums(), passes.sums()
            for t in range(iterations):
                before, sums = sums, before
                passes.launch("step", tau, steps, masses, before, sums, t)
            out = passes.bins(torch.float32) if counted else soft
            passes.launch("soften", tau, steps, masses, sums, out, iterations)
            if counted:
                passes.flat("look_up", out.to(weight.dtype), soft)
        ctx.save_for_backward(weight, tau, steps, masses)
        ctx.counted = counted
        return soft, steps[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_soft: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        weight, tau, steps, masses = ctx.saved_tensors
        grad_soft = upstream = grad_soft.contiguous()
        last, counted = len(masses), ctx.counted
        gradients, rates = torch.empty_like(steps), torch.empty_like(masses)
        gradients[-1] = grad_last
        out = shared = torch.empty_like(weight)
        with torch.cuda.device_of(weight):  # type: ignore[no-untyped-call]
            passes = _Passes(weight, tau, steps.shape[2], counted=counted)
            if counted:
                upstream = passes.bins(torch.float32)
                passes.flat("add_gradients", grad_soft, upstream)
                out, shared = passes.bins(torch.float32), passes.bins(torch.float32)
            applied, before, sums = passes.sums(), passes.sums(), passes.sums()
            passes.launch("pull_apply", upstream, tau, steps, applied, last, reduces=False)
            trace = (steps, masses, gradients, rates, applied)
            for t in range(last - 1, -1, -1):
                before, sums = sums, before
                passes.launch("pull_step", tau, *trace, before, sums, t, last)
            passes.launch("finish", upstream, tau, *trace, sums, out, shared, last)
            if counted:
                grad_weight = torch.empty_like(weight)
                passes.flat("combine", grad_soft, out, shared, grad_weight)
                out = grad_weight
        return out, gradients[0], None, None, None
