"""Where the centroids start: the exact optimum of weighted 1-D k-means, group by group."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from edkm_export.clustering.native import Array, bits_of, kernel, numpy_of, spread, values_of_bits
from edkm_export.clustering.partition import centroids_of_edges, partition, partition_with_zero
from edkm_export.errors import PaletteError

__all__ = ["optimal_centroids"]

_EXPONENT_MASK = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}
_NONE: Array = np.zeros((1, 0), np.float32)  # stands for "no importance" in the kernels


def optimal_centroids(
    weight: Tensor,
    k: int,
    *,
    importance: Tensor | None = None,
    zero_preserving: bool = False,
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact weighted 1-D k-means of each group, by dynamic programming on its histogram.

    Minimizes `sum_i importance_i * min_j (weight_i - c_j)**2`; no other centroids do better, up to the
    rounding of float64 (about 1e-15 of the group's total variance). An exact start matters because DKM, like
    Lloyd's iteration, stays near the optimum it begins at. Runs on the CPU, in threads.

    Args:
        weight: float16, bfloat16, float32 or float64 [groups, m].
        k: centroids in a group, at least 1.
        importance: nonnegative float [groups, m], or [n] with n dividing m, repeated along each group: for
            example the Fisher information of the weight, or the activation energy of the column for groups
            of whole rows. None means equal. Values whose importance is zero do not count, unless it is zero
            in the whole group: then all weights count the same.
        zero_preserving: pin one centroid to exactly 0.0. The others are optimal given that one.
        threads: that groups are spread over; None: as many as torch uses.

    Returns:
        Centroids float64 [groups, k], ascending; a group of at most k values has these, the last repeated.
        Weighted squared error float64 [groups].

    Raises:
        PaletteError: wrong shapes or dtypes, k < 1, NaN or infinity in the weight, importance that is
            negative or not finite.
    """
    _check(weight, k, importance)
    groups = len(weight)
    source = weight.detach().cpu().contiguous()
    shares = _NONE if importance is None else _importance_array(importance)
    centroids, error = np.empty((groups, k)), np.empty(groups)
    status = np.zeros(groups, np.bool_)
    if source.dtype in _EXPONENT_MASK:
        bits, values = bits_of(source), values_of_bits(source.dtype).double().numpy()
        mask = _EXPONENT_MASK[source.dtype]

        def solve(start: int, stop: int) -> None:
            _solve_bits(bits, values, mask, shares, start, stop, zero_preserving, centroids, error, status)

    else:
        array = source.numpy()

        def solve(start: int, stop: int) -> None:
            for group in range(start, stop):
                row, share = array[group], shares[group if len(shares) > 1 else 0]
                if share.size:
                    order = np.argsort(row)
                    row, share = row[order], share[order % len(share)]
                else:
                    row = np.sort(row)
                out = error[group : group + 1]
                status[group] = _solve_sorted(row, share, zero_preserving, centroids[group], out)

    block = max(1, min(64, groups // (4 * (threads or torch.get_num_threads()))))
    spread(solve, groups, block, threads)
    if not status.all():
        group = int(np.flatnonzero(~status)[0])
        raise PaletteError(f"weight: group {group} of {groups} holds NaN or infinity.")
    return torch.from_numpy(centroids).to(weight.device), torch.from_numpy(error).to(weight.device)


def _check(weight: Tensor, k: int, importance: Tensor | None) -> None:
    if weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
        raise PaletteError(
            f"weight is {weight.dtype} {list(weight.shape)}, expected a non-empty float [groups, m]."
        )
    if k < 1:
        raise PaletteError(f"k is {k}, expected at least one centroid.")
    if importance is None:
        return
    repeats = importance.dim() == 1 and importance.numel() > 0 and weight.shape[1] % importance.numel() == 0
    if not (repeats or importance.shape == weight.shape) or not importance.is_floating_point():
        raise PaletteError(
            f"importance is {importance.dtype} {list(importance.shape)}, expected float {list(weight.shape)}, or "
            f"one axis whose length divides {weight.shape[1]}."
        )
    low, high = importance.detach().aminmax()
    if not (low >= 0 and high < torch.inf):  # aminmax passes NaN on, which fails both
        raise PaletteError(f"importance spans {float(low)} to {float(high)}, expected finite values from 0.")


def _importance_array(importance: Tensor) -> Array:
    flat = importance.detach().cpu()
    flat = flat[None] if flat.dim() == 1 else flat
    return numpy_of(flat if flat.dtype == torch.float64 else flat.float())


@kernel
def _solve_bits(
    bits: Array,
    values: Array,
    exponent_mask: int,
    shares: Array,
    first: int,
    last: int,
    zero_preserving: bool,
    centroids: Array,
    error: Array,
    status: Array,
) -> None:
    """Solve groups [first, last) of 16-bit patterns [groups, m]; the histogram is in order of value."""
    histogram = np.zeros(65536)
    x, n = np.empty(65536), np.empty(65536)
    for group in range(first, last):
        row = bits[group]
        share = shares[group if len(shares) > 1 else 0]
        total = 0.0
        for i in range(len(share)):
            total += share[i]
        finite, low, high, at = True, 65535, 0, 0
        for i in range(len(row)):
            pattern = int(row[i])
            finite &= pattern & exponent_mask != exponent_mask
            if pattern == 0x8000:  # -0.0 is 0.0
                pattern = 0
            key = 0xFFFF - pattern if pattern & 0x8000 else pattern + 0x8000
            if total > 0.0:
                histogram[key] += share[at]
                at = at + 1 if at + 1 < len(share) else 0  # a short share repeats
            else:
                histogram[key] += 1.0
            low = min(low, key)
            high = max(high, key)
        unique = 0
        for key in range(low, high + 1):
            if histogram[key] > 0.0:
                x[unique] = values[key - 0x8000 if key >= 0x8000 else 0xFFFF - key]
                n[unique] = histogram[key]
                unique += 1
            histogram[key] = 0.0
        status[group] = finite
        if finite:
            error[group] = _solve_histogram(x[:unique], n[:unique], zero_preserving, centroids[group])


@kernel
def _solve_sorted(row: Array, share: Array, zero_preserving: bool, centroids: Array, error: Array) -> bool:
    """One ascending row [m]; False if it is not finite (NaN sorts last)."""
    m = len(row)
    if not (np.isfinite(row[0]) and np.isfinite(row[m - 1])):
        return False
    total = 0.0
    for i in range(len(share)):
        total += share[i]
    x, n = np.empty(m), np.empty(m)
    unique = 0
    for i in range(m):
        weight = np.float64(share[i]) if total > 0.0 else 1.0
        if weight > 0.0:
            if unique and x[unique - 1] == row[i]:
                n[unique - 1] += weight
            else:
                x[unique], n[unique] = row[i] + 0.0, weight  # -0.0 is 0.0
                unique += 1
    error[0] = _solve_histogram(x[:unique], n[:unique], zero_preserving, centroids)
    return True


@kernel
def _solve_histogram(x: Array, n: Array, zero_preserving: bool, centroids: Array) -> float:
    k, unique = len(centroids), len(x)
    at = np.searchsorted(x, 0.0)
    add_zero = zero_preserving and (at == unique or x[at] != 0.0)
    if unique + int(add_zero) <= k:
        filled = unique
        centroids[:unique] = x
        if add_zero:
            centroids[at + 1 : unique + 1] = x[at:]
            centroids[at] = 0.0
            filled += 1
        centroids[filled:] = centroids[filled - 1]
        return 0.0
    if zero_preserving:
        edges, pinned = partition_with_zero(x, n, k)
        return centroids_of_edges(x, n, edges, pinned, centroids)
    return centroids_of_edges(x, n, partition(x, n, k), -1, centroids)
