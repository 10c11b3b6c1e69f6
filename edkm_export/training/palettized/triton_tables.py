"""Triton kernels for tables and indices. Imported only where CUDA and Triton are.

Each program works on one block of one group. Indices are read as the bytes they are: nothing of the size of the
weight is ever held in a wider type.
"""
# Triton's language is untyped.
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["assign", "look_up", "nearest", "segment_sums"]

_BLOCK = 4096


@triton.jit
def _look_up(indices, table, out, m, blocks, k: tl.constexpr, block: tl.constexpr) -> None:
    group = tl.program_id(0) // blocks
    inside = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    at = group.to(tl.int64) * m + inside
    index = tl.load(indices + at, mask=inside < m, other=0).to(tl.int32)
    tl.store(out + at, tl.load(table + group * k + index), mask=inside < m)


@triton.jit
def nearest(value, row, k: tl.constexpr, block: tl.constexpr):
    """Number of the entry of `row` [k] that is nearest to each value [block], the first of equals."""
    least = tl.full((block,), float("inf"), tl.float32)
    best = tl.zeros((block,), tl.int32)
    for j in range(k):
        distance = tl.abs(value - tl.load(row + j))
        nearer = distance < least
        least = tl.where(nearer, distance, least)
        best = tl.where(nearer, j, best)
    return best


@triton.jit
def _assign(
    weight,
    centroids,
    indices,
    moved,
    m,
    blocks,
    k: tl.constexpr,
    block: tl.constexpr,
) -> None:
    group = tl.program_id(0) // blocks
    inside = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    at = group.to(tl.int64) * m + inside
    value = tl.load(weight + at, mask=inside < m, other=0.0).to(tl.float32)
    best = nearest(value, centroids + group * k, k, block)
    before = tl.load(indices + at, mask=inside < m, other=0).to(tl.int32)
    changed = tl.sum(((before != best) & (inside < m)).to(tl.int32), axis=0)
    tl.store(indices + at, best.to(tl.uint8), mask=inside < m)
    tl.atomic_add(moved, changed)


@triton.jit
def _sums(values, indices, partial, m, blocks, k: tl.constexpr, block: tl.constexpr) -> None:
    group = tl.program_id(0) // blocks
    inside = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    at = group.to(tl.int64) * m + inside
    value = tl.load(values + at, mask=inside < m, other=0.0).to(tl.float32)
    index = tl.load(indices + at, mask=inside < m, other=0).to(tl.int32)
    row = partial + tl.program_id(0).to(tl.int64) * k
    for j in range(k):
        tl.store(row + j, tl.sum(tl.where(index == j, value, 0.0), axis=0))


def look_up(table: Tensor, indices: Tensor) -> Tensor:
    """See `tables.look_up`."""
    groups, m = indices.shape
    out = torch.empty(groups, m, dtype=table.dtype, device=indices.device)
    blocks = triton.cdiv(m, _BLOCK)
    _look_up[(groups * blocks,)](indices, table, out, m, blocks, k=table.shape[1], block=_BLOCK)
    return out


def assign(weight: Tensor, centroids: Tensor, indices: Tensor, moved: Tensor) -> None:
    """See `tables.assign`; `moved` is int32 here."""
    groups, m = indices.shape
    blocks = triton.cdiv(m, _BLOCK)
    _assign[(groups * blocks,)](
        weight, centroids, indices, moved, m, blocks, k=centroids.shape[1], block=_BLOCK
    )


def segment_sums(values: Tensor, indices: Tensor, k: int) -> Tensor:
    """See `tables.segment_sums`. Blocks are added in a fixed order, so that the result is reproducible."""
    groups, m = indices.shape
    blocks = triton.cdiv(m, _BLOCK)
    partial = torch.empty(groups, blocks, k, dtype=torch.float32, device=indices.device)
    _sums[(groups * blocks,)](values, indices, partial, m, blocks, k=k, block=_BLOCK)
    return partial.sum(1)
