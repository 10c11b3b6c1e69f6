"""Exact weighted 1-D k-means on a sorted histogram: the dynamic programme.

Optimal clusters of sorted points are intervals, so cost[q][i], the least error of the first i points in q
clusters, is min over a of cost[q-1][a] + error(a, i). The error obeys the quadrangle inequality, hence the
best a grows with i and with q (Yao 1980); each layer is divide and conquer between neighbours that are known,
and the whole is O(k U log U) (Gronlund et al. 2017, arXiv 1701.07204, section 2).
"""

from __future__ import annotations

import numpy as np

from edkm_export.clustering.native import Array, kernel

__all__ = ["centroids_of_edges", "partition", "partition_with_zero"]

# Entries of a back-pointer table; a larger problem is cut at its middle cluster (Hirschberg 1975) instead.
_TABLE_ENTRIES = 1 << 22

# The running weight must grow strictly, so that no interval divides by zero. Far below float64's rounding.
_LEAST_SHARE = 1e-30


@kernel
def _prefix(x: Array, n: Array) -> tuple[Array, Array, Array]:
    """Sum up n, n x and n x**2, a zero in front; x is centred and scaled, as differences are taken."""
    size = len(x)
    total = 0.0
    for i in range(size):
        total += n[i]
    mean = 0.0
    for i in range(size):
        mean += n[i] / total * x[i]
    spread = max(x[size - 1] - mean, mean - x[0])
    if spread == 0.0:
        spread = 1.0
    p0, p1, p2 = np.zeros(size + 1), np.zeros(size + 1), np.zeros(size + 1)
    for i in range(size):
        value, weight = (x[i] - mean) / spread, max(n[i] / total, _LEAST_SHARE)
        p0[i + 1] = max(p0[i] + weight, p0[i] * (1.0 + 2.0**-52))
        p1[i + 1] = p1[i] + weight * value
        p2[i + 1] = p2[i] + weight * value * value
    return p0, p1, p2


@kernel
def _last_start(base: Array, p0: Array, p1: Array, i: int, low: int, high: int) -> tuple[int, float]:
    """Best start a in [low, high] of the cluster that ends at i; base[a] = cost[a] - p2[a]."""
    w_end, s_end = p0[i], p1[i]
    best, best_cost = low, np.inf
    for a in range(low, high + 1):
        s = s_end - p1[a]
        cost = base[a] - s * s / (w_end - p0[a])
        if cost < best_cost:
            best, best_cost = a, cost
    return best, best_cost


@kernel
def _first_layer(p0: Array, p1: Array, p2: Array, cost: Array, start: Array) -> None:
    cost[0], start[0] = 0.0, 0
    for i in range(1, len(p0)):
        s = p1[i] - p1[0]
        cost[i] = p2[i] - p2[0] - s * s / (p0[i] - p0[0])
        start[i] = 0


@kernel
def _next_layer(
    q: int, p0: Array, p1: Array, p2: Array, base: Array, cost: Array, start: Array, next_start: Array
) -> None:
    """Layer q from layer q - 1, for i in [q, size]; `cost` is overwritten, `base` is scratch."""
    size = len(p0) - 1
    for a in range(q - 1, size + 1):
        base[a] = cost[a] - p2[a]
    states = size - q + 1
    stride = 1
    while stride * 2 <= states:
        stride *= 2
    while stride:
        for rank in range(stride, states + 1, 2 * stride):
            i = q - 1 + rank
            low = max(start[i], q - 1)
            if rank > stride:
                low = max(low, next_start[i - stride])
            high = i - 1
            if rank + stride <= states:
                high = min(high, next_start[i + stride])
            best, best_cost = _last_start(base, p0, p1, i, min(low, high), high)
            next_start[i] = best
            cost[i] = best_cost + p2[i]
        stride //= 2


@kernel
def _edges_by_table(p0: Array, p1: Array, p2: Array, k: int, edges: Array, offset: int) -> None:
    """Write the k starts of the clusters, plus `offset`, to edges[0:k]."""
    size = len(p0) - 1
    starts = np.zeros((k, size + 1), np.int32)
    cost, base = np.empty(size + 1), np.empty(size + 1)
    _first_layer(p0, p1, p2, cost, starts[0])
    for q in range(2, k):
        _next_layer(q, p0, p1, p2, base, cost, starts[q - 2], starts[q - 1])
    end = size
    if k > 1:  # of the last layer one state is needed
        for a in range(k - 1, size):
            base[a] = cost[a] - p2[a]
        end, _ = _last_start(base, p0, p1, size, max(k - 1, starts[k - 2, size]), size - 1)
        edges[k - 1] = end + offset
    for q in range(k - 1, 1, -1):
        end = starts[q - 1, end]
        edges[q - 1] = end + offset
    edges[0] = offset


@kernel
def _middle_edge(p0: Array, p1: Array, p2: Array, k: int, half: int) -> int:
    """Where the first `half` of k optimal clusters end, in memory of O(U)."""
    size = len(p0) - 1
    start, next_start = np.zeros(size + 1, np.int32), np.zeros(size + 1, np.int32)
    cost, base = np.empty(size + 1), np.empty(size + 1)
    middle, next_middle = np.arange(size + 1).astype(np.int32), np.zeros(size + 1, np.int32)
    _first_layer(p0, p1, p2, cost, start)
    for q in range(2, k + 1):
        _next_layer(q, p0, p1, p2, base, cost, start, next_start)
        start, next_start = next_start, start
        if q > half:
            for i in range(q, size + 1):
                next_middle[i] = middle[start[i]]
            middle, next_middle = next_middle, middle
    return int(middle[size])


@kernel
def partition(x: Array, n: Array, k: int, table_entries: int = _TABLE_ENTRIES) -> Array:
    """Optimal intervals.

    Args:
        x: float64 [U], strictly ascending.
        n: float64 [U], positive.
        k: number of clusters, at most U.
        table_entries: largest back-pointer table, in entries of 4 bytes.

    Returns:
        int64 [k + 1]: cluster j holds the points [edges[j], edges[j + 1]).
    """
    p0, p1, p2 = _prefix(x, n)
    edges = np.zeros(k + 1, np.int64)
    edges[k] = len(x)
    todo = [(0, k)]  # clusters [first, last) whose outer edges are known
    while len(todo):
        first, last = todo.pop()
        low, high, count = edges[first], edges[last], last - first
        s0, s1, s2 = p0[low : high + 1], p1[low : high + 1], p2[low : high + 1]
        if count < 4 or count * (high - low + 1) <= table_entries:
            _edges_by_table(s0, s1, s2, count, edges[first:last], low)
        else:
            half = count // 2
            edges[first + half] = low + _middle_edge(s0, s1, s2, count, half)
            todo.append((first, first + half))
            todo.append((first + half, last))
    return edges


@kernel
def _with_zero_behind(x: Array, n: Array, most: int) -> tuple[Array, Array]:
    """For negative x: error of q <= most free clusters and one at zero behind, and where that one starts."""
    size = len(x)
    error, begin = np.full(most + 1, np.inf), np.zeros(most + 1, np.int64)
    p0, p1, p2 = np.zeros(size + 1), np.zeros(size + 1), np.zeros(size + 1)
    for i in range(size):
        p0[i + 1] = max(p0[i] + max(n[i], _LEAST_SHARE), p0[i] * (1.0 + 2.0**-52))
        p1[i + 1] = p1[i] + n[i] * x[i]
        p2[i + 1] = p2[i] + n[i] * x[i] * x[i]
    error[0] = p2[size]
    cost, base = np.empty(size + 1), np.empty(size + 1)
    start, next_start = np.zeros(size + 1, np.int32), np.zeros(size + 1, np.int32)
    _first_layer(p0, p1, p2, cost, start)
    for q in range(1, min(most, size) + 1):
        if q > 1:
            _next_layer(q, p0, p1, p2, base, cost, start, next_start)
            start, next_start = next_start, start
        for a in range(q, size + 1):
            candidate = cost[a] + (p2[size] - p2[a])
            if candidate < error[q]:
                error[q], begin[q] = candidate, a
    return error, begin


@kernel
def partition_with_zero(x: Array, n: Array, k: int) -> tuple[Array, int]:
    """Optimal intervals when one centroid is pinned to zero.

    Clusters left of the pinned one hold negative points only and those to its right positive points only (a
    point is nearer to its own centroid than to zero), so that the two sides are separate problems that share
    the k - 1 free centroids; every split of these is tried.

    Args:
        x: float64 [U], strictly ascending.
        n: float64 [U], positive.
        k: number of clusters; at most the number of points other than zero.

    Returns:
        int64 [k + 1] edges as from `partition`, and the index of the pinned cluster, which may be empty.
    """
    size = len(x)
    negatives = np.searchsorted(x, 0.0)
    positives = size - np.searchsorted(x, 0.0, side="right")
    largest = max(abs(x[0]), abs(x[size - 1]))
    scaled, share = x / largest, n / n.sum()
    left_error, left_stop = _with_zero_behind(scaled[:negatives], share[:negatives], k - 1)
    mirrored, mirrored_share = -scaled[::-1][:positives], share[::-1][:positives]
    right_error, right_stop = _with_zero_behind(mirrored, mirrored_share, k - 1)
    left = 0
    for q in range(k):
        if left_error[q] + right_error[k - 1 - q] < left_error[left] + right_error[k - 1 - left]:
            left = q
    right = k - 1 - left
    edges = np.zeros(k + 1, np.int64)
    stop, begin = left_stop[left], size - right_stop[right]
    if left:
        edges[: left + 1] = partition(x[:stop], n[:stop], left)
    edges[left] = stop
    if right:
        edges[left + 1 :] = begin + partition(x[begin:], n[begin:], right)
    edges[left + 1], edges[k] = begin, size
    return edges, left


@kernel
def centroids_of_edges(x: Array, n: Array, edges: Array, pinned: int, centroids: Array) -> float:
    """Write the weighted means (zero for the cluster `pinned`) and return the weighted squared error."""
    error = 0.0
    for j in range(len(edges) - 1):
        low, high = edges[j], edges[j + 1]
        weight, moment = 0.0, 0.0
        for i in range(low, high):  # relative to the first point: exact for a cluster of one
            weight += n[i]
            moment += n[i] * (x[i] - x[low])
        centroids[j] = 0.0 if j == pinned else x[low] + moment / weight
        for i in range(low, high):
            error += n[i] * (x[i] - centroids[j]) ** 2
    return error
