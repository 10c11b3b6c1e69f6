"""Tables and indices: look up, sum by index, assign. The three operations that training adds to a step.

`indices` are uint8 [groups, m], one byte a weight and never widened as a whole; `table` holds what each index of
each group stands for, [groups, k]. On CUDA they run in Triton where it is installed, on the CPU in numba, and
in plain torch, block by block, everywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from edkm_export.clustering import hard_assign
from edkm_export.clustering.native import Array, kernel, spread

__all__ = ["assign", "has_kernels", "look_up", "segment_sums", "use_counts"]

_BLOCK = 1 << 20  # weights whose indices are widened at a time
_HOST_BLOCK = 1 << 18  # weights that one CPU task handles


@cache
def _triton() -> ModuleType | None:
    try:
        from edkm_export.training.palettized import triton_tables
    except ImportError:
        return None
    return triton_tables


def _kernels(indices: Tensor) -> ModuleType | None:
    return _triton() if indices.device.type == "cuda" else None


def has_kernels(indices: Tensor) -> bool:
    """Whether tables of these indices are handled by Triton's kernels."""
    return _kernels(indices) is not None


def _blocks(groups: int, m: int) -> Iterator[tuple[slice, slice]]:
    columns = min(m, _BLOCK)
    rows = max(1, _BLOCK // columns)
    for row in range(0, groups, rows):
        for column in range(0, m, columns):
            yield slice(row, row + rows), slice(column, column + columns)


def look_up(table: Tensor, indices: Tensor) -> Tensor:
    """What each index stands for.

    Args:
        table: any dtype [groups, k], contiguous.
        indices: uint8 [groups, m], contiguous.

    Returns:
        [groups, m] in the table's dtype.
    """
    groups, m = indices.shape
    assert table.shape[0] == groups and indices.is_contiguous() and table.is_contiguous()
    if (kernels := _kernels(indices)) is not None:
        found: Tensor = kernels.look_up(table, indices)
        return found
    out = torch.empty(groups, m, dtype=table.dtype, device=indices.device)
    if indices.device.type == "cpu":
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[
            table.element_size()
        ]  # numba knows no bfloat16
        source, names, target = table.detach().view(bits).numpy(), indices.numpy(), out.view(bits).numpy()
        _by_groups(lambda some: _look_up_host(source[some], names[some], target[some]), groups, m)
        return out
    for rows, columns in _blocks(groups, m):
        out[rows, columns] = table[rows].gather(1, indices[rows, columns].long())
    return out


@kernel
def _look_up_host(table: Array, indices: Array, out: Array) -> None:
    for group in range(indices.shape[0]):
        for i in range(indices.shape[1]):
            out[group, i] = table[group, indices[group, i]]


def segment_sums(values: Tensor, indices: Tensor, k: int) -> Tensor:
    """Sum the values that share an index.

    Args:
        values: float [groups, m], contiguous.
        indices: uint8 [groups, m], contiguous, below `k`.
        k: entries of a table.

    Returns:
        [groups, k], float64 for float64 values, otherwise float32.
    """
    groups, m = indices.shape
    assert values.shape == indices.shape and values.is_contiguous() and indices.is_contiguous()
    if (kernels := _kernels(indices)) is not None and values.dtype != torch.float64:
        found: Tensor = kernels.segment_sums(values, indices, k)
        return found
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    out = torch.zeros(groups, k, dtype=wide, device=indices.device)
    if indices.device.type == "cpu":
        names, target = indices.numpy(), out.numpy()

        def add(some: slice) -> None:
            _segment_sums_host(values[some].detach().to(wide).numpy(), names[some], target[some])

        _by_groups(add, groups, m)
        return out
    for rows, columns in _blocks(groups, m):
        out[rows].scatter_add_(1, indices[rows, columns].long(), values[rows, columns].to(wide))
    return out


@kernel
def _segment_sums_host(values: Array, indices: Array, out: Array) -> None:
    """Add up in float64, as a row may hold millions of values."""
    sums = out[0].astype("float64")
    for group in range(indices.shape[0]):
        sums[:] = 0.0
        for i in range(indices.shape[1]):
            sums[indices[group, i]] += values[group, i]
        out[group] = sums


def assign(weight: Tensor, centroids: Tensor, indices: Tensor, moved: Tensor) -> None:
    """Give each weight the index of its nearest centroid, in place.

    Args:
        weight: float [groups, m], contiguous.
        centroids: float32 or float64 [groups, k], in any order.
        indices: uint8 [groups, m], contiguous; overwritten.
        moved: int32 [1]; the number of indices that changed is added, on the device, without waiting for it.

    Raises:
        PaletteError: on the CPU, a weight or centroid is not finite.
    """
    if (kernels := _kernels(indices)) is not None and weight.dtype != torch.float64:
        kernels.assign(weight, centroids.float(), indices, moved)
        return
    found = hard_assign(weight, centroids)
    moved += (found != indices).sum().to(moved.dtype)
    indices.copy_(found)


def use_counts(indices: Tensor, k: int) -> Tensor:
    """How often each index of each group is used, int32 [groups, k]."""
    groups = indices.shape[0]
    counts = torch.zeros(groups, k, dtype=torch.int32, device=indices.device)
    one = torch.ones((), dtype=torch.int32, device=indices.device)
    for rows, columns in _blocks(*indices.shape):
        block = indices[rows, columns]
        counts[rows].scatter_add_(1, block.long(), one.expand(block.shape))
    return counts


def _by_groups(task: object, groups: int, m: int) -> None:
    assert callable(task)
    spread(lambda start, stop: task(slice(start, stop)), groups, max(1, _HOST_BLOCK // m))
