"""All clusters of a model at once: a handful of launches a step instead of some for each layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edkm_export.training.clusters import Clusters
from edkm_export.training.grid import Rounded

__all__ = ["ClusterBatch"]


class ClusterBatch:
    """Refreshes many `Clusters` together; the result is that of refreshing each.

    LUTs are small, and rounding each of some hundred takes longer to launch than to compute. Those on a float16
    grid are rounded as one row; int8 grids, whose scale is a group's own, one by one.
    """

    def __init__(self, clusters: Sequence[Clusters]) -> None:
        self.clusters = list(clusters)
        self._joined = [
            each
            for each in self.clusters
            if each.grid.lut_dtype == "float16" and (each.weight.requires_grad or each.lut.requires_grad)
        ]
        self._units: Tensor | None = None

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
            self._round(stale)
            for each in stale:
                each.assign()
        for each in self.clusters:
            each.fresh()

    def _round(self, clusters: list[Clusters]) -> None:
        for each in clusters:
            each.adopt()
        if self._units is None or self._units.device != clusters[0].unit.device:
            self._units = torch.cat([each.unit.expand_as(each.lut).reshape(-1) for each in clusters])
        row = torch.cat([each.lut.detach().view(-1) for each in clusters]).mul_(self._units)[None]
        grid = clusters[0].grid
        values = grid.round(row).values[0]
        dtypes = {self._units.dtype, torch.bfloat16} if grid.in_bfloat16 else {self._units.dtype}
        rows = {dtype: values.to(dtype) for dtype in dtypes}
        start = 0
        for each in clusters:
            some = slice(start, start + each.lut.numel())
            own = values[some].view(each.lut.shape)
            each.take(
                Rounded(own, own, None),
                {dtype: row[some].view(each.lut.shape) for dtype, row in rows.items()},
            )
            start = some.stop
