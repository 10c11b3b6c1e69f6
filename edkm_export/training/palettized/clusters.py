"""Clusters: a master weight, its LUTs and its indices, kept together while they train."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edkm_export.clustering import soft_cluster
from edkm_export.clustering.fused import can_fuse
from edkm_export.clustering.fused_trace import FusedTrace, finish
from edkm_export.palette import PalettizedTensor
from edkm_export.recipe import Rule
from edkm_export.training.palettized.fingerprint import fingerprint
from edkm_export.training.palettized.grid import Grid, Rounded
from edkm_export.training.palettized.tables import assign, look_up, segment_sums, use_counts

__all__ = ["Backward", "ClusterMethod", "Clusters"]

Backward = Literal["straight-through", "soft", "dkm"]

_MOST_SOFT = 16  # entries


@dataclass(frozen=True)
class ClusterMethod:
    """How gradients pass the clustering.

    Attributes:
        backward: "straight-through": the gradient of the palettized weight goes to the master weight as it is,
            and to each LUT entry as the sum over its weights. "soft": the same forward pass and LUT gradient,
            but the master weight gets the exact gradient of soft k-means there, G d + h. "dkm": soft k-means
            in both passes, as published (arXiv 2108.12659); the LUT is then the last iteration's centroids.
        alpha: temperature of "soft" and "dkm", in units of the mean squared error of the first assignment.
        iterations: of "dkm", and of "soft" in its backward pass.

    LUTs of more than 16 entries are trained straight through in any case: their rounding error is below what
    softness could repair, and attention over 256 entries a weight costs more than the model.
    """

    backward: Backward = "straight-through"
    alpha: float = 1.0
    iterations: int = 1

    def suited(self, k: int) -> ClusterMethod:
        """The method for LUTs of `k` entries."""
        return self if k <= _MOST_SOFT else ClusterMethod()


class Clusters(nn.Module):
    """One weight on its way to a `PalettizedTensor`.

    Indices and LUT values are brought up to date once an optimizer step: `refresh` does it when it is called, and
    `fresh`, which each forward pass calls, when the parameters have changed since. Micro-batches and the recomputation
    of gradient checkpointing see the same ones.

    An optimizer that was attached (`surgery.attach`) says when it has stepped. Of others, version counters tell; fused
    ones do not move these, so that parameters with a gradient are compared by a fingerprint in each forward pass: right
    as well, but it reads them all.

    Attributes:
        weight: master weight, float parameter [out, in] (a convolution's: [out, in, height, width]).
        lut: learned centroids, float parameter [groups, k], in units of `unit`, so that one learning rate suits
            weights of every scale. Frozen with "dkm".
        unit: root mean square of each group's first centroids, [groups, 1].
        factor: of the gradients of `lut`, see `lut_gradient`; [groups, 1].
        indices: uint8 [groups, m].
        temperature: of soft clustering, [groups].
        moved: int32 [1], indices that changed since it was last set to zero.
        deferred: leave the gradient of `lut` to `ClusterBatch.gradients`. With "straight-through" only.
    """

    weight: nn.Parameter
    lut: nn.Parameter
    unit: Tensor
    factor: Tensor
    indices: Tensor
    temperature: Tensor
    moved: Tensor

    def __init__(
        self,
        weight: Tensor,
        centroids: Tensor,
        rule: Rule,
        method: ClusterMethod,
        *,
        in_bfloat16: bool = False,
    ) -> None:
        super().__init__()
        groups, k = centroids.shape
        wide = torch.promote_types(weight.dtype, torch.float32)
        start = centroids.detach().to(device=weight.device, dtype=wide)
        unit = start.square().mean(1, keepdim=True).sqrt()
        unit = torch.where(unit > 0, unit, 1.0)
        method = method.suited(k)
        self._hold(
            rule,
            method,
            Grid(rule.lut_dtype, in_bfloat16),
            weight=nn.Parameter(weight.detach()),
            lut=nn.Parameter(start / unit, requires_grad=method.backward != "dkm"),
            unit=unit,
            indices=torch.zeros(groups, weight.numel() // groups, dtype=torch.uint8, device=weight.device),
            temperature=torch.ones(groups, dtype=wide, device=weight.device),
        )
        self.refresh()
        self.moved.zero_()
        if self.method.backward != "straight-through":
            self._set_temperature()

    def _hold(
        self,
        rule: Rule,
        method: ClusterMethod,
        grid: Grid,
        *,
        weight: nn.Parameter,
        lut: nn.Parameter,
        unit: Tensor,
        indices: Tensor,
        temperature: Tensor,
    ) -> None:
        """Take these as the parts; nothing is computed from them yet but what follows from shapes."""
        self.rule, self.method, self.grid = rule, method, grid
        self.weight, self.lut = weight, lut
        self.register_buffer("unit", unit)
        self.register_buffer("factor", self._lut_factor(), persistent=False)
        self.register_buffer("indices", indices)
        self.register_buffer("temperature", temperature)
        self.register_buffer("moved", torch.zeros(1, dtype=torch.int32, device=unit.device), persistent=False)
        self.deferred = False
        self._steps = 0  # of optimizers that are attached
        self._attached: set[int] = set()  # ids of their parameters; those of a copy are others
        self._seen: tuple[int, int, int] | None = None
        self._mark: int | None = None  # fingerprint of parameters that may be stepped without a word
        self._tables: dict[torch.dtype, Tensor] = {}
        self._last: Tensor | None = None
        self._trace: FusedTrace | None = None  # of the weight as it is
        self._rounded: Rounded | None = None

    @property
    def k(self) -> int:
        """Entries of a LUT."""
        return int(self.lut.shape[1])

    @property
    def groups(self) -> int:
        """Number of LUTs."""
        return int(self.lut.shape[0])

    @property
    def is_soft(self) -> bool:
        """Whether the forward pass of training uses the soft weight."""
        return self.method.backward == "dkm" and self.training

    @property
    def defers_gradients(self) -> bool:
        """Whether gradients get their final form once a step instead of in each backward pass."""
        return self.deferred

    def product_indices(self, weight: Tensor) -> Tensor:
        """Indices for a product with the whole weight; `weight` is the parameter as autograd sees it."""
        return self.indices

    def decode(self, table: Tensor, indices: Tensor) -> Tensor:
        """The whole weight from a table of its LUT values and `product_indices`, in the table's dtype."""
        return look_up(table, indices)

    def use_counts(self) -> Tensor:
        """How often each index of each group is used, int32 [groups, k]."""
        return use_counts(self.indices, self.k)

    def grouped(self, values: Tensor) -> Tensor:
        """View of the weight's shape as [groups, m]."""
        return values.reshape(self.groups, -1)

    def centroids(self) -> Tensor:
        """LUT entries before rounding, [groups, k]."""
        return self.lut.detach() * self.unit

    @torch.no_grad()
    def _set_temperature(self) -> None:
        values = look_up(self.rounded().values.to(self.unit.dtype), self.indices)
        error = (self.grouped(self.weight.detach()) - values).square_().mean(1)
        self.temperature.copy_((self.method.alpha * error).clamp_min(torch.finfo(error.dtype).tiny * 2**20))

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring LUT values and indices up to date with the parameters.

        Raises:
            PaletteError: on the CPU, a weight or centroid is not finite.
        """
        self.adopt()
        self._round()
        self.assign()

    @torch.no_grad()
    def narrow(self) -> None:
        """Hold the master weight in bfloat16 from now on; indices and LUT stay those of the weight so far."""
        self.weight.data = self.weight.data.bfloat16()
        self.seen()

    def adopt(self) -> None:
        """With "dkm", make the last iteration's centroids the LUT."""
        if self._last is not None:
            self.lut.data.copy_(self._last / self.unit)
            self._last = None

    @torch.no_grad()
    def assign(self) -> None:
        """Give each weight the index of its nearest LUT value."""
        assign(self.grouped(self.weight.detach()), self.table(self.unit.dtype), self.indices, self.moved)

    def own_weight(self) -> Tensor:
        """The weight as far as this process holds it, [rows of `indices`, m]."""
        return self.grouped(self.weight.detach())

    def own_gradient(self) -> Tensor | None:
        """The gradient of `own_weight`."""
        return None if self.weight.grad is None else self.grouped(self.weight.grad)

    def own_groups(self) -> Tensor:
        """Group of each row of `indices`, int64 on the CPU."""
        return torch.arange(self.groups)

    @staticmethod
    def assigned(clusters: Sequence[Any]) -> None:
        """Do what is left when the indices of these were assigned together."""

    @torch.no_grad()
    def restored(self) -> None:
        """Take parameters and indices that were just loaded as they are: they belong together."""
        self._last = None
        self.factor.copy_(self._lut_factor())
        self._round()

    def _lut_factor(self) -> Tensor:
        weights = self.weight.numel() / self.lut.numel()  # an entry has
        return self.unit / math.sqrt(weights)

    def _round(self) -> None:
        rounded = self.grid.round(self.centroids())
        self._rounded = rounded
        self._tables = {
            dtype: each for dtype, each in self._tables.items() if each.device == self.indices.device
        }
        for table in self._tables.values():
            table.copy_(rounded.values)  # in place, for a recorded CUDA graph reads them there
        self.seen()

    def keep(self, rounded: Rounded, tables: dict[torch.dtype, Tensor]) -> None:
        """Hold LUT values in these tensors, which a `ClusterBatch` writes; `tables` are the same in other dtypes."""
        self._rounded, self._tables = rounded, tables

    def attach(self, parameters: set[int]) -> bool:
        """Rely on `stepped` for the parameters of these ids; whether any of them is one of ours."""
        ours = parameters & {id(self.weight), id(self.lut)}
        self._attached |= ours
        return bool(ours)

    def stepped(self) -> None:
        """Take note that an optimizer that was attached has stepped."""
        self._steps += 1

    def note_gradient(self) -> None:
        """Take note, before an optimizer can, that a gradient is on its way to the parameters."""
        if self._mark is None and (silent := self._silent()):
            self._mark = fingerprint(silent)

    @property
    def is_attached(self) -> bool:
        """Whether an attached optimizer tells of each step."""
        return not self._silent()

    def _silent(self) -> list[nn.Parameter]:
        """Trained parameters of which no attached optimizer tells."""
        return [
            each for each in (self.weight, self.lut) if each.requires_grad and id(each) not in self._attached
        ]

    def seen(self) -> None:
        """Take note that LUT values and indices are those of the parameters as they are."""
        self._seen, self._mark, self._trace = self._state(), None, None
        if any(each.grad is not None for each in self._silent()):  # it may be used for another step
            self.note_gradient()

    @property
    def is_stale(self) -> bool:
        """Whether the parameters may have changed since the last refresh."""
        if self._seen != self._state():
            return True
        return self._mark is not None and self._mark != fingerprint(self._silent())

    def _state(self) -> tuple[int, int, int]:
        return (self.weight._version, self.lut._version, self._steps)

    def fresh(self) -> None:
        """Refresh if the parameters may have changed since the last time."""
        if self.is_stale:
            self.refresh()

    def set_grid(self, *, in_bfloat16: bool) -> None:
        """Choose the grid for the dtype that products run in."""
        self.grid = Grid(self.rule.lut_dtype, in_bfloat16)
        self.refresh()

    @torch.no_grad()
    def refit(self) -> None:
        """Move each centroid to the mean of its weights; one without weights stays where it is."""
        self.fresh()
        weight = self.grouped(self.weight.detach())
        counts = segment_sums(torch.ones_like(weight), self.indices, self.k)
        means = segment_sums(weight, self.indices, self.k) / counts.clamp_min(1)
        self.lut.copy_(torch.where(counts > 0, means, self.centroids()) / self.unit)
        self.refresh()

    def rounded(self) -> Rounded:
        """LUTs on their grid."""
        assert self._rounded is not None
        return self._rounded

    def table(self, dtype: torch.dtype) -> Tensor:
        """LUT values in the dtype of a product, [groups, k]."""
        if dtype not in self._tables or self._tables[dtype].device != self.indices.device:
            self._tables[dtype] = self.rounded().values.to(device=self.indices.device, dtype=dtype)
        return self._tables[dtype]

    def soft_weight(self, weight: Tensor, centroids: Tensor) -> Tensor:
        """Differentiable soft weight [groups, m], and remember the centroids that it ends at."""
        soft, last = soft_cluster(
            self.grouped(weight), centroids, temperature=self.temperature, iterations=self.method.iterations
        )
        if self.method.backward == "dkm":
            self._last = last.detach()
        return soft

    def _fused(self) -> FusedTrace | None:
        """The recurrence of the weight, unrolled once an optimizer step; None where the kernels do not take it.

        A recorded step unrolls it wherever it is needed: what is kept from before would not change with the weight.
        """
        weight = self.grouped(self.weight.detach())
        if weight.dtype != torch.float32 or not can_fuse(
            weight, self.unit, self.temperature, self.method.iterations
        ):
            return None
        if self._trace is not None and not torch.cuda.is_current_stream_capturing():
            return self._trace
        trace = finish(FusedTrace.unroll(weight, self.centroids(), self.temperature, self.method.iterations))
        if self.method.backward == "dkm":
            self._last = trace.last
        self._trace = None if torch.cuda.is_current_stream_capturing() else trace
        return trace

    @torch.no_grad()
    def soft_values(self, dtype: torch.dtype) -> Tensor:
        """Soft weight of a forward pass, in the shape of the weight; not differentiable."""
        if (trace := self._fused()) is None:
            soft = self.soft_weight(self.weight.detach(), self.centroids())
            return soft.to(dtype).view(self.weight.shape)
        out = torch.empty(self.indices.shape, dtype=dtype, device=self.indices.device)
        trace.soften(out)
        return out.view(self.weight.shape)

    def soft_gradients(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the master weight and of `lut` through the soft weight, from that of the latter [groups, m]."""
        if (trace := self._fused()) is not None:
            out = torch.empty_like(trace.weight)
            first = finish(trace.pull_back(grad.to(out.dtype).contiguous(), None, out))
            return out.view(self.weight.shape), first * self.unit
        with torch.enable_grad():
            leaf = self.weight.detach().requires_grad_()
            start = self.lut.detach().requires_grad_()
            soft = self.soft_weight(leaf, start * self.unit)
            exact, of_lut = torch.autograd.grad(soft, (leaf, start), grad.to(soft.dtype))
        return exact, of_lut

    def lut_gradient(self, grad: Tensor, indices: Tensor) -> Tensor:
        """Gradient of `lut` from that of the palettized weight, both [groups, .].

        Divided by the square root of the number of weights an entry has: as large as the gradient of a single
        weight when these are independent, so that clipping by the common norm treats the two alike.
        """
        return segment_sums(grad, indices, self.k).to(self.unit.dtype).mul_(self.factor)

    @torch.no_grad()
    def export(self, name: str) -> PalettizedTensor:
        """What the hard forward pass uses, as it ships."""
        self.fresh()
        rounded = self.rounded()
        return PalettizedTensor.from_indices(
            name,
            rounded.lut[:, None, :, None],
            self.indices.view(self.weight.shape[0], -1),
            shape=tuple(self.weight.shape),
            lut_scale=None if rounded.scale is None else rounded.scale[:, None],
            lut_dtype=self.grid.lut_dtype,
        )
