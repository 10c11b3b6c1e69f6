"""Clusters of which each process holds a share of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edkm_export.clustering import soft_cluster
from edkm_export.clustering.fused import can_fuse
from edkm_export.clustering.fused_trace import FusedTrace, Joined
from edkm_export.clustering.recurrence import Points, apply, pull_back, unroll
from edkm_export.palette import PalettizedTensor
from edkm_export.training.distributed import lockstep
from edkm_export.training.distributed.gathered import Gathered, Master
from edkm_export.training.distributed.processes import Processes
from edkm_export.training.distributed.rows import Rows
from edkm_export.training.palettized.clusters import Clusters
from edkm_export.training.palettized.tables import assign, look_up, segment_sums, use_counts

__all__ = ["ShardedClusters", "plain"]


def plain(value: Any) -> Tensor:
    """The part of this process of a parameter or gradient, as an ordinary tensor."""
    local: Any = value.to_local() if hasattr(value, "to_local") else value
    found: Tensor = local.plain if isinstance(local, Master) else local
    return found


@dataclass(frozen=True)
class _SplitPoints(Points):
    """Pieces of groups whose other pieces may be in other processes."""

    rows: Rows | None = None

    def total(self, sums: Tensor) -> Tensor:
        assert self.rows is not None
        return self.rows.total_of_pieces(sums)


class ShardedClusters(Clusters):
    """`Clusters` in shares.

    In shares: master weight, its gradient, its optimizer state, and indices. In every process: the LUTs, which are
    small. Indices are gathered for a product (see `gathered`); gradients of LUTs, and those through soft k-means,
    are computed once an optimizer step, from the reduced gradient of the rows that the process holds: both are
    linear in it.

    Attributes:
        indices: uint8 [pieces, m], a view of the rows that are gathered.
        rows: which rows these are.
    """

    _padded: Tensor  # indices [share, in, ...]
    _soft: Tensor | None  # "dkm": soft weight of these rows, [share, in, ...]

    @torch.no_grad()
    def __init__(self, clusters: Clusters, name: str, processes: Processes) -> None:
        """Keep this process's rows of indices, and prepare the weight for FSDP2 to cut.

        Args:
            clusters: the same in each process; the LUT stays theirs.
            name: of the module, for messages.
            processes: more than one.

        Raises:
            InputError: there are fewer rows than processes.
        """
        nn.Module.__init__(self)
        weight = clusters.weight
        self.rows = Rows(name, weight.shape[0], clusters.groups, processes, weight.device)
        own = slice(self.rows.start, self.rows.stop)
        indices = clusters.indices.view(weight.shape)[own]
        self._padded = indices.new_zeros(self.rows.share, *weight.shape[1:])
        self._padded[: len(indices)] = indices
        self._hold(
            clusters.rule,
            clusters.method,
            clusters.grid,
            weight=nn.Parameter(Master(weight.detach()), requires_grad=weight.requires_grad),
            lut=clusters.lut,
            unit=clusters.unit,
            indices=self.rows.view(self._padded[: len(indices)]),
            temperature=clusters.temperature,
        )
        self.train(clusters.training)
        self._soft = None
        self._round()
        if self.method.backward == "dkm":
            dtype = torch.bfloat16 if self.grid.in_bfloat16 else weight.dtype
            self._soft = torch.zeros_like(self._padded, dtype=dtype)
            self._write_soft(self._first_soft(self.rows.view(weight.detach()[own])))

    def _first_soft(self, weight: Tensor) -> Tensor | FusedTrace:
        """Of these rows, before FSDP2 has cut the weight."""
        if self._can_fuse:
            (trace,) = lockstep.together([self.rows], [self._unroll(weight)])
            (self._last,) = lockstep.agreed([self.rows], [trace.last])
            return trace
        soft, self._last = self._soft_cluster(weight)
        return soft

    @property
    def is_soft(self) -> bool:
        """False: soft weights are computed where their rows are, and gathered."""
        return False

    @property
    def defers_gradients(self) -> bool:
        """True: they are finished in `lut_sums` and `soften_gradient`, when they have been reduced."""
        return True

    def own(self, value: Any) -> Tensor:
        """The rows of this process of the weight or its gradient, [pieces, m]."""
        return self.rows.view(plain(value))

    def contribution(self) -> Tensor:
        """What is gathered: indices, or, as other methods have to be the same in each pass, soft or hard weights."""
        if self._soft is None:
            assert self.indices.data_ptr() == self._padded.data_ptr()
            return self._padded
        if self.training:
            return self._soft
        hard = torch.zeros_like(self._soft)
        table = self.rows.of_pieces(self.table(hard.dtype))
        hard[: self.rows.stop - self.rows.start] = look_up(table, self.indices).view(-1, *hard.shape[1:])
        return hard

    def product_indices(self, weight: Tensor) -> Tensor:
        """The indices that were gathered."""
        assert isinstance(weight, Gathered)
        return weight.rows

    def decode(self, table: Tensor, indices: Tensor) -> Tensor:
        """The gathered weight in the dtype of the table."""
        if indices.is_floating_point():
            return indices.to(table.dtype)
        if indices.device.type == "cpu":
            indices = indices.clone()  # a NumPy view would forbid FSDP2 to free what it gathered
        return look_up(table, indices.view(self.groups, -1))

    def fresh(self) -> None:
        """Refresh if the parameters may have changed; in a forward pass it would be too late."""
        if self.is_stale:
            assert not isinstance(self.weight, Gathered)
            self.refresh()

    def note_gradient(self) -> None:
        """Nothing: `Sharding` attaches the optimizer."""

    def _state(self) -> tuple[int, int, int]:
        return (0, *super()._state()[1:])  # the parameter is another one while it is gathered

    @torch.no_grad()
    def assign(self) -> None:
        """Give each weight of these rows the index of its nearest LUT value."""
        table = self.rows.of_pieces(self.table(self.unit.dtype))
        assign(self.own(self.weight.detach()), table, self.indices, self.moved)
        if self._soft is not None:
            self._soften([self])

    def own_weight(self) -> Tensor:
        """The rows of this process, [pieces, m]."""
        return self.own(self.weight.detach())

    def own_gradient(self) -> Tensor | None:
        """The gradient of these rows, reduced."""
        return None if self.weight.grad is None else self.own(self.weight.grad)

    def own_groups(self) -> Tensor:
        """Group of each piece."""
        return self.rows.group_of.cpu()

    @staticmethod
    def assigned(clusters: Sequence[ShardedClusters]) -> None:
        """Compute the soft weights anew, where there are some."""
        ShardedClusters._soften([each for each in clusters if each._soft is not None])

    @staticmethod
    @torch.no_grad()
    def _soften(clusters: Sequence[ShardedClusters]) -> None:
        """Bring soft weights up to date."""
        able = [each for each in clusters if each._can_fuse]
        if able:
            traces = lockstep.together(
                [each.rows for each in able], [each._unroll(each.own_weight()) for each in able]
            )
            lasts = lockstep.agreed([each.rows for each in able], [trace.last for trace in traces])
            for each, trace, last in zip(able, traces, lasts, strict=True):
                each._write_soft(trace)
                each._trace, each._last = trace, last
        for each in clusters:
            if not each._can_fuse:
                soft, each._last = each._soft_cluster(each.own_weight())
                each._write_soft(soft)

    def _write_soft(self, found: Tensor | FusedTrace) -> None:
        assert self._soft is not None
        room = self._soft[: self.rows.stop - self.rows.start].view(self.indices.shape)
        if isinstance(found, Tensor):
            room.copy_(found)
        else:
            found.soften(room)

    @property
    def _can_fuse(self) -> bool:
        """Whether the recurrence of these rows, with those of other processes, runs in fused kernels."""
        iterations = self.method.iterations
        return self.weight.dtype == torch.float32 and can_fuse(
            self.indices, self.unit, self.temperature, iterations
        )

    def _unroll(self, weight: Tensor) -> Joined[FusedTrace]:
        """The recurrence of these rows, [pieces, m]."""
        start, tau = self.rows.of_pieces(self.centroids()), self.rows.of_pieces(self.temperature)
        return FusedTrace.unroll(weight, start, tau, self.method.iterations)

    def _soft_cluster(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Soft weight of these rows and the last centroids [groups, k]; not differentiable."""
        rows, start, tau = self.rows, self.centroids(), self.temperature
        if not rows.are_split:
            soft, last = soft_cluster(
                weight,
                rows.of_pieces(start),
                temperature=rows.of_pieces(tau),
                iterations=self.method.iterations,
            )
            return soft, rows.total(last)
        points = _SplitPoints(weight[..., None], None, rows.of_pieces(tau), rows)
        trace = unroll(points, rows.of_pieces(start)[..., None], self.method.iterations)
        soft = torch.empty_like(points.values)
        apply(points, trace, soft)
        return soft[..., 0], rows.of_any_piece(trace.centroids[-1][..., 0])

    def lut_sums(self, grad: Tensor) -> Tensor:
        """The part of this process of the sums of `lut_gradient`, [groups, k]; grad [pieces, m]."""
        return self.rows.of_groups(segment_sums(grad, self.indices, self.k).to(self.unit.dtype))

    @staticmethod
    @torch.no_grad()
    def soften_gradients(clusters: Sequence[ShardedClusters]) -> None:
        """Turn the gradients of palettized weights, reduced, into those of the master weights, in place."""
        soft = [each for each in clusters if each.method.backward != "straight-through"]
        able = [each for each in soft if each._can_fuse]
        new = [
            each for each in able if each._trace is None
        ]  # those of "dkm" were softened, and are the same still
        made = lockstep.together(
            [each.rows for each in new], [each._unroll(each.own_weight()) for each in new]
        )
        traces = {id(each): trace for each, trace in zip(new, made, strict=True)}
        backward = []
        for each in able:
            trace, grad = traces.get(id(each)) or each._trace, each.own(each.weight.grad)
            assert trace is not None
            backward.append(trace.pull_back(grad, None, grad))
        lockstep.together([each.rows for each in able], backward)
        for each in soft:
            if not each._can_fuse:
                each._soften_gradient(each.own(each.weight.grad))

    def _soften_gradient(self, grad: Tensor) -> None:
        """Likewise of one weight [pieces, m], in plain torch."""
        weight, rows, tau = self.own_weight(), self.rows, self.temperature
        start = rows.of_pieces(self.centroids())
        if not rows.are_split:
            with torch.enable_grad():
                leaf = weight.detach().requires_grad_()
                soft, _ = soft_cluster(
                    leaf, start, temperature=rows.of_pieces(tau), iterations=self.method.iterations
                )
                (exact,) = torch.autograd.grad(soft, leaf, grad.to(soft.dtype))
            grad.copy_(exact)
            return
        points = _SplitPoints(weight[..., None], None, rows.of_pieces(tau), rows)
        trace = unroll(points, start[..., None], self.method.iterations)
        out = torch.zeros_like(points.values)
        nothing = torch.zeros_like(start)[..., None]
        pull_back(points, trace, grad[..., None], nothing, out, implicit=False, through=True)
        grad.copy_(out[..., 0])

    @torch.no_grad()
    def refit(self) -> None:
        """Move each centroid to the mean of its weights; one without weights stays where it is."""
        weight = self.own(self.weight.detach())
        counts = self.rows.total(segment_sums(torch.ones_like(weight), self.indices, self.k))
        means = self.rows.total(segment_sums(weight, self.indices, self.k)) / counts.clamp_min(1)
        self.lut.copy_(torch.where(counts > 0, means, self.centroids()) / self.unit)
        self.refresh()

    def use_counts(self) -> Tensor:
        """How often each index of each group is used, int32 [groups, k]."""
        return self.rows.total(use_counts(self.indices, self.k))

    def index_rows(self) -> Tensor:
        """Indices of these rows in the shape of the weight's, uint8 [rows, in, ...]; they may be written."""
        return self._padded[: self.rows.stop - self.rows.start]

    @staticmethod
    @torch.no_grad()
    def restored_all(clusters: Sequence[ShardedClusters]) -> None:
        """Take parameters and indices that were just loaded as they are; a collective."""
        for each in clusters:
            each.restored()
        ShardedClusters.assigned(clusters)

    def all_indices(self) -> Tensor:
        """Indices of all rows, in every process: uint8 [groups, m]."""
        return self.rows.gather(self._padded, self.weight.shape[0]).view(self.groups, -1)

    @torch.no_grad()
    def export(self, name: str) -> PalettizedTensor:
        """What the hard forward pass uses, as it ships; in every process."""
        held, self.indices = self.indices, self.all_indices()
        try:
            return super().export(name)
        finally:
            self.indices = held
