"""All clusters of a model at once: a handful of launches a step instead of some for each layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edkm_export.training.palettized.clusters import Clusters
from edkm_export.training.palettized.grid import Grid, Rounded
from edkm_export.training.palettized.tables import has_kernels

__all__ = ["ClusterBatch"]


@dataclass(frozen=True)
class _Alike:
    """LUTs of one grid and one number of entries, which are rounded together.

    Attributes:
        grid: of all.
        k: entries of each.
        part: their place in the row of all values.
        lut: entries as stored, [LUTs, k].
        scale: float16 [LUTs], None for a float16 grid.
    """

    grid: Grid
    k: int
    part: slice
    lut: Tensor
    scale: Tensor | None

    def round(self, row: Tensor, values: Tensor) -> None:
        """Round the centroids of `row` into `values` and what is stored, in place."""
        rounded = self.grid.round(row[self.part].view(-1, self.k))
        values[self.part] = rounded.values.view(-1)
        self.lut.copy_(rounded.lut)
        if self.scale is not None and rounded.scale is not None:
            self.scale.copy_(rounded.scale)


class _Tables:
    """LUT values of several clusters in one row, and each cluster's part of it; those of a kind lie side by side."""

    def __init__(self, clusters: Sequence[Clusters]) -> None:
        self.clusters = sorted(clusters, key=lambda each: (each.grid.lut_dtype, each.k))
        first = self.clusters[0]
        self.device = first.unit.device
        self.units = torch.cat([each.unit.expand_as(each.lut).reshape(-1) for each in self.clusters])
        self.values = torch.empty_like(self.units, dtype=torch.float16)
        dtypes = {self.units.dtype, torch.bfloat16} if first.grid.in_bfloat16 else {self.units.dtype}
        self.rows = {dtype: torch.empty_like(self.units, dtype=dtype) for dtype in dtypes}
        sizes = torch.tensor([each.lut.numel() for each in self.clusters])
        self.offsets: dict[Clusters, int] = dict(
            zip(self.clusters, (sizes.cumsum(0) - sizes).tolist(), strict=True)
        )
        self._alike: list[_Alike] = []
        stored: list[tuple[Tensor, Tensor | None]] = []
        for _, some in itertools.groupby(self.clusters, key=lambda each: (each.grid, each.k)):
            kind, own = self._joined(list(some))
            self._alike.append(kind)
            stored += own
        parts = {dtype: self.parts(row) for dtype, row in self.rows.items()}
        self._kept = [
            (Rounded(own, *stored[place]), {dtype: parts[dtype][place] for dtype in dtypes})
            for place, own in enumerate(self.parts(self.values))
        ]

    def _joined(self, clusters: list[Clusters]) -> tuple[_Alike, list[tuple[Tensor, Tensor | None]]]:
        """A kind, and what each of its clusters stores: LUT and scale."""
        grid, k, counts = clusters[0].grid, clusters[0].k, [each.groups for each in clusters]
        start, whole = self.offsets[clusters[0]], sum(counts)
        part = slice(start, start + whole * k)
        if grid.lut_dtype == "float16":
            lut: Tensor = self.values[part].view(whole, k)
            return _Alike(grid, k, part, lut, None), [(own, None) for own in torch.split(lut, counts)]
        lut = torch.empty(whole, k, dtype=torch.int8, device=self.device)
        scale = torch.empty(whole, dtype=torch.float16, device=self.device)
        stored = zip(torch.split(lut, counts), torch.split(scale, counts), strict=True)
        return _Alike(grid, k, part, lut, scale), list(stored)

    def round(self) -> None:
        """Bring the values up to date, in place."""
        row = torch.cat([each.lut.detach().view(-1) for each in self.clusters]).mul_(self.units)
        for kind in self._alike:
            kind.round(row, self.values)
        for table in self.rows.values():
            table.copy_(self.values)
        for each, (rounded, tables) in zip(self.clusters, self._kept, strict=True):
            each.keep(rounded, tables)

    def parts(self, row: Tensor) -> list[Tensor]:
        """Each cluster's part [groups, k] of such a row."""
        return [
            row[offset : offset + each.lut.numel()].view(each.lut.shape)
            for each, offset in self.offsets.items()
        ]


class ClusterBatch:
    """Refreshes many `Clusters` together; the result is that of refreshing each.

    LUTs are small, and rounding each of some hundred takes longer to launch than to compute. Those of one grid and
    one number of entries are rounded together. On CUDA weights are assigned in one launch, too, and the gradients of
    LUTs computed in one, see `defer`.
    """

    def __init__(self, clusters: Sequence[Clusters]) -> None:
        self.clusters = list(clusters)
        self._joined = [each for each in self.clusters if each.weight.requires_grad or each.lut.requires_grad]
        self._tables: _Tables | None = None
        self._jobs: list[tuple[list[Clusters], Any]] | None = None
        self._addresses: list[tuple[int, int]] = []
        self._gradient: Tensor | None = None
        self._gradients: list[Tensor] = []
        self._factors = torch.empty(0)

    def __len__(self) -> int:
        return len(self.clusters)

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring all up to date that may have changed.

        Raises:
            PaletteError: on the CPU, a weight or centroid is not finite.
        """
        stale = [each for each in self._joined if each.is_stale]
        if stale and len(stale) == len(self._joined) and len({each.grid.in_bfloat16 for each in stale}) == 1:
            for each in stale:
                each.adopt()
            tables = self._tables_of(stale)
            tables.round()
            for each in stale:
                each.seen()
            if self._on_device():
                for _, jobs in self._all_jobs():
                    jobs.assign(tables.rows[torch.float32])
                type(stale[0]).assigned(stale)
            else:
                for each in stale:
                    each.assign()
        for each in self.clusters:
            each.fresh()

    def defer(self) -> bool:
        """Take over the gradients of LUTs, if all weights are on CUDA, trained, and straight-through.

        The gradient of a LUT entry is the sum over its weights of theirs, which is linear: one pass over the
        weights' gradients, when the last backward pass of an optimizer step is done, is enough. From now on
        `gradients` must be called there. Weights in shares are left to `Sharding`, which calls it.
        """
        able = self.can_sum and all(each.method.backward == "straight-through" for each in self._joined)
        able = able and all(type(each) is Clusters for each in self._joined)
        for each in self._joined:
            each.deferred = able
        return able

    @property
    def can_sum(self) -> bool:
        """Whether the gradients of all LUTs can be summed in one pass: all on CUDA, and trained."""
        return self._on_device() and all(
            each.weight.requires_grad and each.lut.requires_grad for each in self._joined
        )

    @torch.no_grad()
    def gradients(self) -> None:
        """Set the gradients of LUTs that are deferred, from those of the weights."""
        if self._joined and self._joined[0].deferred:
            self.sum_gradients(None)

    @torch.no_grad()
    def sum_gradients(self, total: Callable[[Tensor], Tensor] | None) -> None:
        """Set the gradients of LUTs from those of the weights; `total` adds up one tensor over all processes."""
        tables, all_jobs = self._tables_of(self._joined), self._all_jobs()
        if self._gradient is None:
            self._gradient = torch.zeros_like(tables.rows[torch.float32])
            self._gradients = tables.parts(self._gradient)
            factors = [each.factor.expand_as(each.lut).reshape(-1) for each in tables.clusters]
            self._factors = torch.cat(factors)
        self._gradient.zero_()
        for clusters, jobs in all_jobs:
            found = [each.own_gradient() for each in clusters]
            jobs.sums(
                [
                    torch.zeros_like(each.own_weight()) if grad is None else grad.contiguous()
                    for grad, each in zip(found, clusters, strict=True)
                ],
                self._gradient,
            )
        if total is not None:
            total(self._gradient)
        self._gradient.mul_(self._factors)
        for each, gradient in zip(tables.clusters, self._gradients, strict=True):
            each.lut.grad = gradient

    def _on_device(self) -> bool:
        return bool(self._joined) and all(
            has_kernels(each.indices) and each.unit.dtype == torch.float32 for each in self._joined
        )

    def _tables_of(self, clusters: list[Clusters]) -> _Tables:
        if self._tables is None or self._tables.device != clusters[0].unit.device:
            self._tables = _Tables(clusters)
        return self._tables

    def _all_jobs(self) -> list[tuple[list[Clusters], Any]]:
        """Weights of equal k and dtype, and their kernels; made anew when a weight was moved."""
        addresses = [(each.own_weight().data_ptr(), each.indices.data_ptr()) for each in self._joined]
        if self._jobs is None or addresses != self._addresses:
            from edkm_export.training.palettized.triton_batch import Jobs

            offsets = self._tables_of(self._joined).offsets
            alike: dict[tuple[int, torch.dtype], list[Clusters]] = {}
            for each in self._joined:
                alike.setdefault((each.k, each.weight.dtype), []).append(each)
            self._addresses, self._gradient = addresses, None
            self._jobs = [
                (
                    some,
                    Jobs(
                        [each.own_weight() for each in some],
                        [each.indices for each in some],
                        [each.moved for each in some],
                        [offsets[each] + each.own_groups() * k for each in some],
                        k,
                    ),
                )
                for (k, _), some in alike.items()
            ]
        return self._jobs
