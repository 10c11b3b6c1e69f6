"""All clusters of a model at once: a handful of launches a step instead of some for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from edkm_export.training.clusters import Clusters
from edkm_export.training.grid import Rounded
from edkm_export.training.tables import has_kernels

__all__ = ["ClusterBatch"]


class _Tables:
    """LUT values of several clusters in one row, and each cluster's part of it."""

    def __init__(self, clusters: Sequence[Clusters]) -> None:
        first = clusters[0]
        self.clusters = list(clusters)
        self.device = first.unit.device
        self.units = torch.cat([each.unit.expand_as(each.lut).reshape(-1) for each in clusters])
        self.values = torch.empty_like(self.units, dtype=torch.float16)
        dtypes = {self.units.dtype, torch.bfloat16} if first.grid.in_bfloat16 else {self.units.dtype}
        self.rows = {dtype: torch.empty_like(self.units, dtype=dtype) for dtype in dtypes}
        sizes = torch.tensor([each.lut.numel() for each in clusters])
        self.offsets: list[int] = (sizes.cumsum(0) - sizes).tolist()
        self._kept = [
            (Rounded(own, own, None), dict(zip(dtypes, parts, strict=True)))
            for own, *parts in zip(
                self.parts(self.values), *(self.parts(self.rows[each]) for each in dtypes), strict=True
            )
        ]

    def round(self) -> None:
        """Bring the values up to date, in place."""
        row = torch.cat([each.lut.detach().view(-1) for each in self.clusters]).mul_(self.units)[None]
        self.values.copy_(self.clusters[0].grid.round(row).values[0])
        for table in self.rows.values():
            table.copy_(self.values)
        for each, (rounded, tables) in zip(self.clusters, self._kept, strict=True):
            each.keep(rounded, tables)

    def parts(self, row: Tensor) -> list[Tensor]:
        """Each cluster's part [groups, k] of such a row."""
        return [
            row[offset : offset + each.lut.numel()].view(each.lut.shape)
            for each, offset in zip(self.clusters, self.offsets, strict=True)
        ]


class ClusterBatch:
    """Refreshes many `Clusters` together; the result is that of refreshing each.

    LUTs are small, and rounding each of some hundred takes longer to launch than to compute. Those on a float16
    grid are rounded as one row; int8 and int4 grids, whose scale is a group's own, one by one. On CUDA weights are
    assigned in one launch, too, and the gradients of LUTs computed in one, see `defer`.
    """

    def __init__(self, clusters: Sequence[Clusters]) -> None:
        self.clusters = list(clusters)
        self._joined = [
            each
            for each in self.clusters
            if each.grid.lut_dtype == "float16" and (each.weight.requires_grad or each.lut.requires_grad)
        ]
        self._tables: _Tables | None = None
        self._jobs: list[tuple[list[Clusters], Any]] | None = None
        self._addresses: list[tuple[int, int]] = []
        self._gradient: Tensor | None = None
        self._gradients: list[Tensor] = []
        self._factors: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.clusters)

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring all up to date that may have changed.

        Raises:
            PaletteError: on the CPU, a weight or centroid is not finite.
        """
        stale = [each for each in self._joined if each.is_stale]
        if stale and len(stale) == len(self._joined) and len({each.grid for each in stale}) == 1:
            for each in stale:
                each.adopt()
            tables = self._tables_of(stale)
            tables.round()
            if self._on_device():
                for _, jobs in self._all_jobs():
                    jobs.assign(tables.rows[torch.float32])
            else:
                for each in stale:
                    each.assign()
            for each in stale:
                each.seen()
        for each in self.clusters:
            each.fresh()

    def defer(self) -> bool:
        """Take over the gradients of LUTs, if all weights are on CUDA, trained, and straight-through.

        The gradient of a LUT entry is the sum over its weights of theirs, which is linear: one pass over the
        weights' gradients, when the last backward pass of an optimizer step is done, is enough. From now on
        `gradients` must be called there.
        """
        able = self._on_device() and all(
            each.method.backward == "straight-through"
            and each.weight.requires_grad
            and each.lut.requires_grad
            for each in self._joined
        )
        for each in self._joined:
            each.deferred = able
        return able

    @torch.no_grad()
    def gradients(self) -> None:
        """Set the gradients of LUTs that are deferred, from those of the weights."""
        if not self._joined or not self._joined[0].deferred:
            return
        tables = self._tables_of(self._joined)
        self._all_jobs()
        if self._gradient is None:
            self._gradient = torch.zeros_like(tables.rows[torch.float32])
            self._gradients = tables.parts(self._gradient)
            for number, (clusters, _) in enumerate(self._all_jobs()):
                self._factors[number] = torch.cat([each.factor.view(-1) for each in clusters])
        for number, (clusters, jobs) in enumerate(self._all_jobs()):
            found = [each.weight.grad for each in clusters]
            jobs.sums(
                [
                    torch.zeros_like(each.weight) if grad is None else grad.contiguous()
                    for grad, each in zip(found, clusters, strict=True)
                ],
                self._factors[number],
                self._gradient,
            )
        for each, gradient in zip(tables.clusters, self._gradients, strict=True):
            each.lut.grad = gradient

    def _on_device(self) -> bool:
        return bool(self._joined) and all(
            type(each) is Clusters and has_kernels(each.codes) and each.unit.dtype == torch.float32
            for each in self._joined
        )

    def _tables_of(self, clusters: list[Clusters]) -> _Tables:
        if self._tables is None or self._tables.device != clusters[0].unit.device:
            self._tables = _Tables(clusters)
        return self._tables

    def _all_jobs(self) -> list[tuple[list[Clusters], Any]]:
        """Weights of equal k and dtype, and their kernels; made anew when a weight was moved."""
        addresses = [(each.weight.data_ptr(), each.codes.data_ptr()) for each in self._joined]
        if self._jobs is None or addresses != self._addresses:
            from edkm_export.training.triton_batch import Jobs

            offsets = dict(zip(map(id, self._joined), self._tables_of(self._joined).offsets, strict=True))
            alike: dict[tuple[int, torch.dtype], list[Clusters]] = {}
            for each in self._joined:
                alike.setdefault((each.k, each.weight.dtype), []).append(each)
            self._addresses, self._gradient = addresses, None
            self._jobs = [
                (
                    some,
                    Jobs(
                        [each.weight.detach() for each in some],
                        [each.codes for each in some],
                        [each.moved for each in some],
                        [offsets[id(each)] for each in some],
                        k,
                    ),
                )
                for (k, _), some in alike.items()
            ]
        return self._jobs
