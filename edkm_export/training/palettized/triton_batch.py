"""Triton kernels over many weights at once: one launch a step where each weight by itself would take one.

A job is a stretch of one group of one weight. Weights lie where the optimizer left them, so that kernels get lists
of addresses. Imported only where CUDA and Triton are.
"""
# Triton's language is untyped.
# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from edkm_export.training.palettized.triton_tables import nearest

__all__ = ["Jobs"]

_SPAN = 1 << 14  # weights of a job
_BLOCK = 2048  # weights assigned at a time
_TILE = 4096  # entries of a tile of sums, 16 a thread
_WARPS = 8


@triton.jit
def _assign(
    weights, indices, moved, owners, starts, sizes, rows, table, like, k: tl.constexpr, block: tl.constexpr
):
    job = tl.program_id(0)
    owner, start, size = tl.load(owners + job), tl.load(starts + job), tl.load(sizes + job)
    weight = tl.load(weights + owner).to(tl.pointer_type(like.dtype.element_ty)) + start
    index_row = tl.load(indices + owner).to(tl.pointer_type(tl.uint8)) + start
    row = table + tl.load(rows + job)
    changed = 0
    for first in range(0, size, block):
        at = first + tl.arange(0, block)
        value = tl.load(weight + at, mask=at < size, other=0.0).to(tl.float32)
        best = nearest(value, row, k, block)
        before = tl.load(index_row + at, mask=at < size, other=0).to(tl.int32)
        changed += tl.sum(((before != best) & (at < size)).to(tl.int32), axis=0)
        tl.store(index_row + at, best.to(tl.uint8), mask=at < size)
    tl.atomic_add(tl.load(moved + owner).to(tl.pointer_type(tl.int32)), changed)


@triton.jit
def _sums(gradients, indices, owners, starts, sizes, partial, like, K: tl.constexpr, block: tl.constexpr):
    job = tl.program_id(0)
    owner, start, size = tl.load(owners + job), tl.load(starts + job), tl.load(sizes + job)
    gradient = tl.load(gradients + owner).to(tl.pointer_type(like.dtype.element_ty)) + start
    index_row = tl.load(indices + owner).to(tl.pointer_type(tl.uint8)) + start
    j = tl.arange(0, K)
    sums = tl.zeros([K, block], tl.float32)
    for first in range(0, size, block):
        at = first + tl.arange(0, block)
        value = tl.load(gradient + at, mask=at < size, other=0.0).to(tl.float32)
        index = tl.load(index_row + at, mask=at < size, other=0).to(tl.int32)
        sums += tl.where(index[None, :] == j[:, None], value[None, :], 0.0)
    tl.store(partial + job.to(tl.int64) * K + j, tl.sum(sums, 1))


@triton.jit
def _add_up(partial, firsts, counts, rows, out, k: tl.constexpr, K: tl.constexpr):
    """Sums of a table from those of its jobs, in order."""
    table = tl.program_id(0)
    first, count = tl.load(firsts + table), tl.load(counts + table)
    j = tl.arange(0, K)
    total = tl.zeros([K], tl.float32)
    for job in range(count):
        total += tl.load(partial + (first + job).to(tl.int64) * K + j)
    tl.store(out + tl.load(rows + table) + j, total, mask=j < k)


class Jobs:
    """Weights of one dtype with tables of one size.

    Args:
        weights: contiguous, each seen as its groups [groups, m].
        indices: uint8 [groups, m] of each, contiguous; they stay where they are.
        moved: int32 [1] of each.
        rows: where the table of each group begins in the flat tables, int64 [groups] of each. Groups whose tables
            are one (pieces of a group that is not held as a whole) follow each other.
        k: entries of a table.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        indices: Sequence[Tensor],
        moved: Sequence[Tensor],
        rows: Sequence[Tensor],
        k: int,
    ) -> None:
        self.weights, self.k, self.width = list(weights), k, max(2, triton.next_power_of_2(k))
        self.device = weights[0].device
        jobs: list[list[Tensor]] = [[], [], [], []]
        for own, (index, row) in enumerate(zip(indices, rows, strict=True)):
            count, m = index.shape
            begin = torch.arange(0, m, _SPAN)
            jobs[0].append(torch.full((count * len(begin),), own))
            jobs[1].append((torch.arange(count)[:, None] * m + begin).view(-1))
            jobs[2].append((m - begin).clamp_max(_SPAN).repeat(count))
            jobs[3].append(row.repeat_interleave(len(begin)))
        tables, counts = torch.cat(jobs[3]).unique_consecutive(return_counts=True)
        self.owners, self.starts, self.sizes, self.rows = (self._put(torch.cat(each)) for each in jobs)
        self.firsts, self.counts = self._put(counts.cumsum(0) - counts), self._put(counts)
        self.table_rows = self._put(tables)
        self._indices, self._moved = self._addresses(indices), self._addresses(moved)
        self._weights = self._addresses(weights)
        self._places: list[int] = []
        self._gradients = self._weights
        self._partial = torch.empty(len(self.owners), self.width, device=self.device)

    def _put(self, numbers: Tensor) -> Tensor:
        return numbers.to(self.device)

    def _addresses(self, tensors: Sequence[Tensor]) -> Tensor:
        assert all(each.is_contiguous() for each in tensors)
        return self._put(torch.tensor([each.data_ptr() for each in tensors]))

    def assign(self, table: Tensor) -> None:
        """Give each weight the index of its nearest entry of the flat float32 table, and count what moved."""
        _assign[(len(self.owners),)](
            self._weights, self._indices, self._moved, self.owners, self.starts, self.sizes, self.rows, table,
            self.weights[0], k=self.k, block=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip

    def sums(self, gradients: Sequence[Tensor], out: Tensor) -> None:
        """Sum gradients of the weights by index into their tables in the flat `out`.

        Stretches are added in a fixed order, so that the result is reproducible.
        """
        places = [each.data_ptr() for each in gradients]
        if places != self._places:  # sending them makes the host wait; recorded steps leave them in one place
            self._places, self._gradients = places, self._addresses(gradients)
        _sums[(len(self.owners),)](
            self._gradients, self._indices, self.owners, self.starts, self.sizes, self._partial,
            gradients[0], K=self.width, block=max(16, _TILE // self.width), num_warps=_WARPS,
        )  # fmt: skip
        _add_up[(len(self.firsts),)](
            self._partial, self.firsts, self.counts, self.table_rows, out, k=self.k, K=self.width,
            num_warps=1,
        )  # fmt: skip
