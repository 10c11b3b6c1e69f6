"""Hard assignment: the nearest centroid of each weight."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from edkm_export.clustering.native import Array, kernel, spread
from edkm_export.errors import PaletteError

__all__ = ["hard_assign"]

_BLOCK = 1 << 20  # distances (or weights, for scalars) handled at a time, to bound the temporaries
_MOST_COUNTED = 16  # centroids whose borders are all compared on the CPU
_IN_CACHE = 4096  # weights whose ranks are counted before the next


def hard_assign(weight: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centroid; of several that are equally near, the lowest index.

    Scalars are compared in float64, where the borders of float16, bfloat16 and float32 centroids are exact.
    Vectors are compared by squared distance in the wider of the two dtypes, float32 at least.

    Args:
        weight: float [groups, m], or vectors [groups, m, dim].
        centroids: float [groups, k] or [groups, k, dim], in any order, k at most 256.

    Returns:
        uint8 [groups, m], on the device of the weight.

    Raises:
        PaletteError: shapes that do not fit, more than 256 centroids, NaN or infinity.
    """
    if weight.dim() not in (2, 3) or centroids.dim() != weight.dim() or centroids.shape[0] != weight.shape[0]:
        raise PaletteError(
            f"weight {list(weight.shape)} and centroids {list(centroids.shape)} do not fit; expected "
            "[groups, m] and [groups, k], or [groups, m, dim] and [groups, k, dim]."
        )
    if weight.dim() == 3 and centroids.shape[2] != weight.shape[2]:
        raise PaletteError(f"weight has vectors of {weight.shape[2]}, the centroids of {centroids.shape[2]}.")
    if not 1 <= centroids.shape[1] <= 256:
        raise PaletteError(f"{centroids.shape[1]} centroids a group, expected 1 to 256 (indices are uint8).")
    weight, centroids = weight.detach(), centroids.detach().to(weight.device)
    _check_finite("weight", weight)
    _check_finite("centroids", centroids)
    indices = torch.empty(weight.shape[:2], dtype=torch.uint8, device=weight.device)
    if weight.dim() == 2:
        _assign_scalars(weight, centroids, indices)
    else:
        _assign_vectors(weight, centroids, indices)
    return indices


def _check_finite(name: str, values: Tensor) -> None:
    if not values.numel():
        return
    flat = values.reshape(values.shape[0], -1)
    low, high = flat.amin(1), flat.amax(1)  # both pass NaN on
    good = torch.isfinite(low) & torch.isfinite(high)
    if not bool(good.all()):
        group = int(torch.argmin(good.int()))
        raise PaletteError(f"{name}: group {group} of {len(flat)} holds NaN or infinity.")


def _assign_scalars(weight: Tensor, centroids: Tensor, indices: Tensor) -> None:
    ordered, order = centroids.double().sort(dim=1, stable=True)  # [groups, k]
    # Equal centroids: the first of the run has the lowest index, and the borders inside the run fall on its
    # own value, so that every one of them is to be answered with the first.
    first = torch.ones_like(order, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    run = torch.where(first, torch.arange(order.shape[1], device=order.device), 0).cummax(dim=1).values
    answer = order.gather(1, run).to(torch.uint8)
    below = answer[:, :-1].int() < answer[:, 1:].int()
    borders = ordered[:, :-1] + (ordered[:, 1:] - ordered[:, :-1]) / 2  # [groups, k - 1]
    # A weight on the border counts as above it when the centroid above has the lower index.
    borders = torch.where(below, borders, borders.nextafter(borders.new_tensor(-torch.inf)))
    if weight.device.type == "cpu":
        _search_on_cpu(weight, borders, answer, indices)
        return
    for rows, columns in _blocks(weight.shape, _BLOCK):
        block = weight[rows, columns].double().contiguous()
        rank = torch.searchsorted(borders[rows].contiguous(), block)
        indices[rows, columns] = answer[rows].gather(1, rank)


def _search_on_cpu(weight: Tensor, borders: Tensor, answer: Tensor, indices: Tensor) -> None:
    groups, k = answer.shape
    if k <= _MOST_COUNTED and weight.dtype != torch.float64:
        # Rounded down to float32, a border still parts the float32 numbers where it did.
        rounded = borders.float()
        low = torch.where(rounded > borders, rounded.nextafter(rounded.new_tensor(-torch.inf)), rounded)
        few, names, out = low.numpy(), answer.numpy(), indices.numpy()

        def count(rows: slice, columns: slice) -> None:
            _count_below(weight[rows, columns].float().numpy(), few[rows], names[rows], out[rows, columns])

        _by_blocks(count, weight.shape, _BLOCK // 4)
        return
    levels = (k - 1).bit_length()
    # Padded to a power of two, the search is a fixed number of halvings without branches.
    padded = torch.full((groups, 1 << levels), torch.inf, dtype=torch.float64)
    padded[:, : k - 1] = borders
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    edges, names, out = padded.numpy(), answer.numpy(), indices.numpy()

    def search(rows: slice, columns: slice) -> None:
        _search(weight[rows, columns].to(wide).numpy(), edges[rows], names[rows], levels, out[rows, columns])

    _by_blocks(search, weight.shape, _BLOCK // 4)


@kernel
def _count_below(weight: Array, borders: Array, answer: Array, indices: Array) -> None:
    """Compare with every border: these loops vectorize, and a search does not."""
    for group in range(weight.shape[0]):
        for start in range(0, weight.shape[1], _IN_CACHE):
            values = weight[group, start : start + _IN_CACHE]
            ranks = indices[group, start : start + _IN_CACHE]
            ranks[:] = 0
            for border in borders[group]:
                for i in range(len(values)):
                    ranks[i] += np.uint8(values[i] > border)
            for i in range(len(values)):
                ranks[i] = answer[group, ranks[i]]


@kernel
def _search(weight: Array, borders: Array, answer: Array, levels: int, indices: Array) -> None:
    for group in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            rank, half = np.uint64(0), np.uint64(1) << np.uint64(levels)
            for _ in range(levels):
                half >>= np.uint64(1)
                if borders[group, rank + half - np.uint64(1)] < weight[group, i]:
                    rank += half
            indices[group, i] = answer[group, rank]


def _assign_vectors(weight: Tensor, centroids: Tensor, indices: Tensor) -> None:
    k, dim = centroids.shape[1:]
    wide = torch.promote_types(torch.promote_types(weight.dtype, centroids.dtype), torch.float32)
    points = centroids.to(wide)
    on_cpu = weight.device.type == "cpu"
    lanes = points.transpose(1, 2).contiguous()  # [groups, dim, k]

    def search(rows: slice, columns: slice) -> None:
        block = weight[rows, columns].to(wide)  # [rows, columns, dim]
        if on_cpu:
            _nearest(block.numpy(), lanes[rows].numpy(), indices[rows, columns].numpy())
            return
        distance = torch.zeros((), dtype=wide, device=weight.device)
        for axis in range(dim):
            distance = distance + (block[:, :, None, axis] - lanes[rows, None, axis]) ** 2
        indices[rows, columns] = distance.argmin(dim=2)

    if on_cpu:
        _by_blocks(search, weight.shape, max(1, _BLOCK // (4 * dim)))
    else:
        for rows, columns in _blocks(weight.shape, max(1, _BLOCK // k)):
            search(rows, columns)


@kernel
def _nearest(weight: Array, lanes: Array, indices: Array) -> None:
    """Lanes [groups, dim, k], so that the inner loop runs along the centroids and vectorizes."""
    _, dim, k = lanes.shape
    distance = np.empty(k, lanes.dtype)
    for group in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            distance[:] = 0.0
            for axis in range(dim):
                value = weight[group, i, axis]
                for j in range(k):
                    distance[j] += (value - lanes[group, axis, j]) ** 2
            best = 0
            for j in range(1, k):
                if distance[j] < distance[best]:
                    best = j
            indices[group, i] = best


def _blocks(shape: torch.Size, size: int) -> list[tuple[slice, slice]]:
    """Cut [groups, m, ...] into blocks of about `size` elements."""
    groups, m = shape[:2]
    columns = max(1, min(m, size))
    rows = max(1, size // columns)
    return [
        (slice(row, row + rows), slice(column, column + columns))
        for row in range(0, groups, rows)
        for column in range(0, m, columns)
    ]


def _by_blocks(task: Callable[[slice, slice], None], shape: torch.Size, size: int) -> None:
    blocks = _blocks(shape, size)

    def run(start: int, stop: int) -> None:
        for rows, columns in blocks[start:stop]:
            task(rows, columns)

    spread(run, len(blocks), 1)
