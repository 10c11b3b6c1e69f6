"""DKM on the GPU with fused kernels: no attention in memory.

Same mathematics and same saved tensors as `histogram` and `streaming`, whose plain torch code remains the
fallback and the oracle.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from edkm_export.clustering.recurrence import least_mass

__all__ = ["FusedHistogram", "FusedStreaming", "FusedTrace", "bins_of", "can_fuse"]

_TILE = 2048  # entries of an attention tile over bins: 16 a thread, which 4 warps hold in registers
_WEIGHT_TILE = 4096  # over weights: 32 a thread, measured 4-15% faster there
_PROGRAMS = 8  # a multiprocessor
_WARPS = 4
_FLAT_BLOCK = 2048  # weights that a program counts or looks up
_WORTH_SAVING = 512  # the share of the weight that saved counts may take: 1 / 512
_COPIES = 64  # of the bins, at most, to count in at the same time
_LEAST = least_mass(torch.float32)


@cache
def _kernels(name: str) -> ModuleType:
    return importlib.import_module(f"edkm_export.clustering.{name}")


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def can_fuse(weight: Tensor, centroids: Tensor, tau: Tensor, iterations: int | None) -> bool:
    """Tell whether the kernels take it: scalars on a CUDA device, float32 arithmetic, a given T, k <= 256."""
    return (
        weight.is_cuda
        and weight.dim() == 2
        and tau.dtype == torch.float32
        and iterations is not None
        and centroids.shape[1] <= 256
        and _has_triton()
    )


def bins_of(dtype: torch.dtype) -> int:
    """Bins of a group's histogram (see `histogram_kernels`); 0 for types that are not counted."""
    return {torch.bfloat16: 1 << 13, torch.float16: 1 << 16}.get(dtype, 0)


@cache
def _cores(device: torch.device) -> int:
    """Multiprocessors; 1 for the CPU, where Triton's interpreter can run the kernels."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class _Passes:
    """Launches of passes over weights [groups, m], `parts` programs a group."""

    def __init__(self, weight: Tensor, tau: Tensor, k: int) -> None:
        self.weight, self.tau, self.k = weight, tau, k
        self.groups, self.m = weight.shape
        self.width = 1 << (k - 1).bit_length()
        self.block = max(16, _WEIGHT_TILE // self.width)
        blocks = -(-self.m // self.block)
        self.parts = max(1, min(-(-_PROGRAMS * _cores(weight.device) // self.groups), blocks))
        self.chunk = -(-blocks // self.parts) * self.block

    @property
    def rows(self) -> int:
        """Programs whose sums are added up at a time."""
        return max(1, _WEIGHT_TILE // self.width)

    def sums(self) -> Tensor:
        """Room for the partial sums of a pass."""
        return self.tau.new_empty(self.groups, self.parts, 2, self.width)

    def launch(self, name: str, *arguments: Tensor | int, reduces: bool = True, **choices: bool) -> None:
        """Launch a pass, with what its kernel takes between `x` and `m`.

        `reduces`: it begins by adding up the sums of the pass before.
        """
        tail: tuple[float, ...] = (self.m, self.chunk, self.groups, self.k, self.parts)
        options: dict[str, Any] = {"K": self.width, "BLOCK": self.block, **choices}
        if reduces:
            tail, options["ROWS"] = (*tail, _LEAST), self.rows
        if name == "iterate":
            options["FIRST"] = arguments[-1] == 0
        kernel = getattr(_kernels("kernels"), name)
        kernel[(self.groups * self.parts,)](self.weight, *arguments, *tail, **options, num_warps=_WARPS)

    def apply_sums(self, upstream: Tensor, iterates: Tensor, collected: Tensor | None) -> Tensor:
        """Sums for the gradients of c^T and c^{T-1} through the soft weight; G d goes to `collected`."""
        applied = self.sums()
        room = upstream if collected is None else collected
        self.launch(
            "pull_apply", upstream, self.tau, iterates, applied, room, len(iterates) - 1, reduces=False,
            COLLECT=collected is not None,
        )  # fmt: skip
        return applied


def _room(centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Tensors for the centroids, c^0 filled in, and the masses of each iteration."""
    groups, k = centroids.shape
    iterates = centroids.new_empty(iterations + 1, groups, k)
    iterates[0] = centroids
    return iterates, centroids.new_empty(iterations, groups, k)


class FusedTrace:
    """The recurrence of some weights, unrolled once; soft weights and gradients come from it without a second time.

    Args:
        weight: [groups, m], contiguous; must not change while the trace is used.
        centroids: c^0, float32 [groups, k].
        tau: float32 [groups].
        iterations: T.
        total: adds the sums of a pass, float32 [groups, 2, K], to those over weights that lie elsewhere; None: there
            are no others.
    """

    def __init__(
        self,
        weight: Tensor,
        centroids: Tensor,
        tau: Tensor,
        iterations: int,
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.weight, self.tau, self._total = weight, tau, total
        self.iterates, self.masses = _room(centroids, iterations)
        with torch.cuda.device_of(weight):  # type: ignore[no-untyped-call]
            passes = self._passes()
            before, sums = passes.sums(), passes.sums()
            for t in range(iterations):
                before, sums = sums, before
                passes.launch("iterate", tau, self.iterates, self.masses, before, sums, t)
                self._join(sums)
            self._sums = sums
            _kernels("kernels").conclude[(passes.groups,)](
                tau, self.iterates, self.masses, sums, iterations, passes.groups, passes.k, passes.parts, _LEAST,
                K=passes.width, ROWS=passes.rows, num_warps=_WARPS,
            )  # fmt: skip

    @classmethod
    def restored(cls, weight: Tensor, tau: Tensor, iterates: Tensor, masses: Tensor) -> FusedTrace:
        """A trace for `pull_back` only, from what another one kept."""
        made = cls.__new__(cls)
        made.weight, made.tau, made._total = weight, tau, None
        made.iterates, made.masses = iterates, masses
        return made

    def _passes(self) -> _Passes:
        return _Passes(self.weight, self.tau, self.iterates.shape[2])

    def _join(self, sums: Tensor) -> None:
        """Make the sums [groups, parts, 2, K] of a pass those over all weights."""
        if self._total is not None:
            whole = self._total(sums.sum(1))
            sums.zero_()
            sums[:, 0] = whole

    @property
    def last(self) -> Tensor:
        """c^T, float32 [groups, k]."""
        return self.iterates[-1]

    def soften(self, out: Tensor) -> None:
        """Write the soft weight A^{T-1} c^T to `out` [groups, m], in its dtype."""
        with torch.cuda.device_of(self.weight):  # type: ignore[no-untyped-call]
            self._passes().launch(
                "soften", self.tau, self.iterates, self.masses, self._sums, out, len(self.masses)
            )

    def pull_back(self, grad_soft: Tensor, grad_last: Tensor | None, out: Tensor) -> Tensor:
        """Gradient of the weight, G d + h, to `out`; the gradient of c^0.

        Args:
            grad_soft: of the soft weight, [groups, m], contiguous; may be `out`.
            grad_last: of c^T [groups, k]; None: zero.
            out: [groups, m].
        """
        tau, last = self.tau, len(self.masses)
        gradients = torch.empty_like(self.iterates)
        gradients[-1] = 0 if grad_last is None else grad_last
        collected = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        with torch.cuda.device_of(self.weight):  # type: ignore[no-untyped-call]
            passes = self._passes()
            applied = passes.apply_sums(grad_soft, self.iterates, collected)
            self._join(applied)
            before, sums = passes.sums(), passes.sums()
            trace = (self.iterates, self.masses, gradients, applied)
            for t in range(last - 1, -1, -1):
                before, sums = sums, before
                target = out if t == 0 else collected
                passes.launch("pull_iteration", tau, *trace, before, sums, collected, target, t, last)
                self._join(sums)
            _kernels("kernels").close[(passes.groups,)](
                tau, self.masses, gradients, applied, sums, last, passes.groups, passes.k, passes.parts, _LEAST,
                K=passes.width, ROWS=passes.rows, num_warps=_WARPS,
            )  # fmt: skip
        return gradients[0]


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
        trace = FusedTrace(weight, centroids, tau, iterations)
        soft = torch.empty_like(weight)
        trace.soften(soft)
        ctx.save_for_backward(weight, tau, trace.iterates, trace.masses)
        return soft, trace.last.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_soft: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        weight, *kept = ctx.saved_tensors
        out = torch.empty_like(weight)
        trace = FusedTrace.restored(weight, *kept)
        return out, trace.pull_back(grad_soft.contiguous(), grad_last, out), None, None


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
        self.kernels = _kernels("histogram_kernels")
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
        copies = max(1, min(_COPIES, _cores(self.weight.device) // self.groups))
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
            *arguments, _LEAST, HALF=self.number // 2, K=width, BLOCK=max(16, _TILE // width), num_warps=_WARPS,
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
        iterates, masses = _room(centroids, iterations)
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
            passes, bins = _Passes(weight, tau, iterates.shape[2]), _Bins(weight, tuple(known))
            applied = passes.apply_sums(grad_soft, iterates, None)
            own, shared = (tau.new_empty(passes.groups, bins.number) for _ in range(2))
            bins.recurrence(
                "unsettle", weight, bins.counts, bins.largest, tau, iterates, masses, gradients, applied, own, shared,
                len(masses), passes.groups, passes.k, passes.parts, width=passes.width, ROWS=passes.rows,
            )  # fmt: skip
            bins.combine(grad_soft, own, shared, out)
        return out, gradients[0], None, None
