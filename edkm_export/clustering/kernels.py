"""Triton kernels of the DKM recurrence on scalars, in float32. Imported only where a GPU is to be used.

Every pass reads the points once and recomputes attention as a [K, BLOCK] tile: the centroids lie along the
registers of one thread, so that the softmax needs no exchange between threads. A group is shared by `parts`
programs; each writes its sums, and every program of the next pass adds up those of its group: one launch a
pass. Atomics are used for histograms only, so that the gradient sums of these may differ in the last digit.

Points are the weights, or all 65,536 patterns of a 16-bit type with their counts (COUNTED): the recurrence on so
short a table costs next to nothing, without finding out first which patterns occur.

Layouts, all contiguous: centroids [T + 1, groups, k]; masses [T, groups, k]; rates and gradients of centroids
likewise; partial sums [groups, parts, 2, K], K the power of two from k.
"""
# Triton's language is untyped, and its kernels take pointers and sizes in long rows.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "add_gradients",
    "combine",
    "count",
    "finish",
    "look_up",
    "pull_apply",
    "pull_step",
    "soften",
    "step",
]


@triton.jit
def _centroids(pointer, t, group, groups, k, fill, K: tl.constexpr):
    """Row [K] of [T, groups, k]; `fill` behind k."""
    j = tl.arange(0, K)
    return tl.load(pointer + (t * groups + group) * k + j, mask=j < k, other=fill)


@triton.jit
def _keep(pointer, t, group, groups, k, values, first, K: tl.constexpr):
    """Write a row of [T, groups, k], from the first program of a group only."""
    j = tl.arange(0, K)
    tl.store(pointer + (t * groups + group) * k + j, values, mask=(j < k) & first)


@triton.jit
def _total(partial, which, group, parts, K: tl.constexpr, ROWS: tl.constexpr):
    """Add up sum `which` [K] of the programs of a group."""
    j = tl.arange(0, K)
    row = tl.arange(0, ROWS)
    start = partial + group * parts * 2 * K + which * K
    total = tl.zeros([K, ROWS], tl.float32)
    for first in range(0, parts, ROWS):
        at = start + (first + row)[None, :] * 2 * K + j[:, None]
        total += tl.load(at, mask=(first + row < parts)[None, :], other=0.0)
    return tl.sum(total, 1)


@triton.jit
def _leave(partial, which, group, part, parts, values, K: tl.constexpr):
    """Write sum `which` of this program."""
    tl.store(partial + ((group * parts + part) * 2 + which) * K + tl.arange(0, K), values)


@triton.jit
def _points(x, counts, group, m, at, COUNTED: tl.constexpr):
    """Values and multiplicities [BLOCK]; the points behind the end have multiplicity 0."""
    inside = at < m
    if COUNTED:  # one table of values for all groups, which holds NaN and infinity where nothing is counted
        n = tl.load(counts + group * m + at, mask=inside, other=0).to(tl.float32)
        value = tl.load(x + at, mask=inside, other=0.0)
        value = tl.where(n > 0, value, 0.0)
    else:
        n = tl.where(inside, 1.0, 0.0)
        value = tl.load(x + group * m + at, mask=inside, other=0.0).to(tl.float32)
    return value, n


@triton.jit
def _attention(value, c, k, inverse_tau, K: tl.constexpr):
    """A and x - c, both [K, BLOCK]."""
    offset = value[None, :] - c[:, None]
    valid = (tl.arange(0, K) < k)[:, None]
    logit = tl.where(valid, offset * offset * (inverse_tau * -1.4426950408889634), float("-inf"))
    power = tl.exp2(logit - tl.max(logit, 0)[None, :])
    return power * (1.0 / tl.sum(power, 0))[None, :], offset


@triton.jit
def _next(
    centroids, masses, partial, t, group, groups, k, parts, least, first, K: tl.constexpr, ROWS: tl.constexpr
):
    """c^t from the sums of pass t - 1: (sum n A, sum n A (x - c)). Keeps it, and S^{t-1}."""
    c = _centroids(centroids, t - 1, group, groups, k, 0.0, K)
    mass = _total(partial, 0, group, parts, K, ROWS)
    moved = _total(partial, 1, group, parts, K, ROWS)
    c = tl.where(mass > least, c + moved / mass, c)
    _keep(centroids, t, group, groups, k, c, first, K)
    _keep(masses, t - 1, group, groups, k, mass, first, K)
    return c


@triton.jit(do_not_specialize=["t"])
def step(
    x, counts, tau, centroids, masses, before, partial, t, m, chunk, groups, k, parts, least,
    FIRST: tl.constexpr, COUNTED: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Pass t of the forward recurrence: c^t from `before`, its sums to `partial`."""
    part = tl.program_id(0) % parts
    group = (tl.program_id(0) // parts).to(tl.int64)
    inverse_tau = 1.0 / tl.load(tau + group)
    if FIRST:
        c = _centroids(centroids, 0, group, groups, k, 0.0, K)
    else:
        c = _next(centroids, masses, before, t, group, groups, k, parts, least, part == 0, K, ROWS)
    mass = tl.zeros([K, BLOCK], tl.float32)
    moved = tl.zeros([K, BLOCK], tl.float32)
    for start in range(part * chunk, tl.minimum(part * chunk + chunk, m), BLOCK):
        value, n = _points(x, counts, group, m, start + tl.arange(0, BLOCK), COUNTED)
        attention, offset = _attention(value, c, k, inverse_tau, K)
        attention *= n[None, :]
        mass += attention
        moved += attention * offset
    _leave(partial, 0, group, part, parts, tl.sum(mass, 1), K)
    _leave(partial, 1, group, part, parts, tl.sum(moved, 1), K)


@triton.jit(do_not_specialize=["t"])
def soften(
    x, counts, tau, centroids, masses, before, out, t, m, chunk, groups, k, parts, least,
    COUNTED: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Last pass, t = T: c^T from `before`, then A^{T-1} c^T to `out` [groups, m]."""
    part = tl.program_id(0) % parts
    group = (tl.program_id(0) // parts).to(tl.int64)
    inverse_tau = 1.0 / tl.load(tau + group)
    c = _centroids(centroids, t - 1, group, groups, k, 0.0, K)
    last = _next(centroids, masses, before, t, group, groups, k, parts, least, part == 0, K, ROWS)
    for start in range(part * chunk, tl.minimum(part * chunk + chunk, m), BLOCK):
        at = start + tl.arange(0, BLOCK)
        value, _ = _points(x, counts, group, m, at, COUNTED)
        attention, _ = _attention(value, c, k, inverse_tau, K)
        soft = tl.sum(attention * last[:, None], 0)
        tl.store(out + group * m + at, soft.to(out.dtype.element_ty), mask=at < m)


@triton.jit(do_not_specialize=["t"])
def pull_apply(
    x, counts, upstream, tau, centroids, partial, t, m, chunk, groups, k, parts,
    COUNTED: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Through f = A(c^{T-1}) c^T, t = T: sums for the gradients of c^T and of c^{T-1} (times tau / 2)."""
    part = tl.program_id(0) % parts
    group = (tl.program_id(0) // parts).to(tl.int64)
    inverse_tau = 1.0 / tl.load(tau + group)
    c = _centroids(centroids, t - 1, group, groups, k, 0.0, K)
    last = _centroids(centroids, t, group, groups, k, 0.0, K)
    of_last = tl.zeros([K, BLOCK], tl.float32)
    of_c = tl.zeros([K, BLOCK], tl.float32)
    for start in range(part * chunk, tl.minimum(part * chunk + chunk, m), BLOCK):
        at = start + tl.arange(0, BLOCK)
        value, _ = _points(x, counts, group, m, at, COUNTED)
        received = tl.load(upstream + group * m + at, mask=at < m, other=0.0).to(tl.float32)
        attention, offset = _attention(value, c, k, inverse_tau, K)
        soft = tl.sum(attention * last[:, None], 0)
        attention *= received[None, :]
        of_last += attention
        of_c += attention * (last[:, None] - soft[None, :]) * offset
    _leave(partial, 0, group, part, parts, tl.sum(of_last, 1), K)
    _leave(partial, 1, group, part, parts, tl.sum(of_c, 1), K)


@triton.jit
def _gradient(
    gradients, masses, applied, before, t, last, group, groups, k, parts, least, inverse_tau, first,
    K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradient of c^t: from `pull_apply` at t = T, otherwise from pass t of `pull_step`. Keeps it.

    gradients[T] holds the upstream gradient of c^T beforehand, and stays as it is: every program reads it.
    """
    if t == last:
        grad = _centroids(gradients, t, group, groups, k, 0.0, K) + _total(applied, 0, group, parts, K, ROWS)
    else:
        alive = _centroids(masses, t, group, groups, k, 1.0, K) > least
        grad = 2 * inverse_tau * _total(before, 0, group, parts, K, ROWS)
        if t == last - 1:
            grad += 2 * inverse_tau * _total(applied, 1, group, parts, K, ROWS)
            after = _centroids(gradients, last, group, groups, k, 0.0, K)
            after += _total(applied, 0, group, parts, K, ROWS)
        else:
            after = _centroids(gradients, t + 1, group, groups, k, 0.0, K)
        grad += tl.where(alive, 0.0, after)  # a centroid that stayed hands its gradient on
        _keep(gradients, t, group, groups, k, grad, first, K)
    return grad


@triton.jit(do_not_specialize=["t", "last"])
def pull_step(
    x, counts, tau, centroids, masses, gradients, rates, applied, before, partial, t, last, m, chunk, groups, k,
    parts, least,
    COUNTED: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Through c^{t+1} = F(c^t, x): the sum for the gradient of c^t (times tau / 2); keeps gradient / S^t."""
    part = tl.program_id(0) % parts
    group = (tl.program_id(0) // parts).to(tl.int64)
    inverse_tau = 1.0 / tl.load(tau + group)
    grad = _gradient(
        gradients, masses, applied, before, t + 1, last, group, groups, k, parts, least, inverse_tau, part == 0,
        K, ROWS,
    )  # fmt: skip
    mass = _centroids(masses, t, group, groups, k, 0.0, K)
    rate = tl.where(mass > least, grad / mass, 0.0)
    _keep(rates, t, group, groups, k, rate, part == 0, K)
    c = _centroids(centroids, t, group, groups, k, 0.0, K)
    after = _centroids(centroids, t + 1, group, groups, k, 0.0, K)
    of_c = tl.zeros([K, BLOCK], tl.float32)
    for start in range(part * chunk, tl.minimum(part * chunk + chunk, m), BLOCK):
        value, n = _points(x, counts, group, m, start + tl.arange(0, BLOCK), COUNTED)
        attention, offset = _attention(value, c, k, inverse_tau, K)
        received = rate[:, None] * (value[None, :] - after[:, None])
        received -= tl.sum(attention * received, 0)[None, :]
        of_c += attention * received * offset * n[None, :]
    _leave(partial, 0, group, part, parts, tl.sum(of_c, 1), K)


@triton.jit(do_not_specialize=["last"])
def finish(
    x, counts, upstream, tau, centroids, masses, gradients, rates, applied, before, out, shared, last, m, chunk,
    groups, k, parts, least,
    COUNTED: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Last pass of the backward: G d + h to `out`, or with COUNTED the tables d to `out` and h to `shared`."""
    part = tl.program_id(0) % parts
    group = (tl.program_id(0) // parts).to(tl.int64)
    inverse_tau = 1.0 / tl.load(tau + group)
    _gradient(
        gradients, masses, applied, before, 0, last, group, groups, k, parts, least, inverse_tau, part == 0,
        K, ROWS,
    )  # fmt: skip
    for start in range(part * chunk, tl.minimum(part * chunk + chunk, m), BLOCK):
        at = start + tl.arange(0, BLOCK)
        value, _ = _points(x, counts, group, m, at, COUNTED)
        own = tl.zeros([BLOCK], tl.float32)
        term = tl.zeros([BLOCK], tl.float32)
        for t in range(0, last):
            c = _centroids(centroids, t, group, groups, k, 0.0, K)
            after = _centroids(centroids, t + 1, group, groups, k, 0.0, K)
            rate = _centroids(rates, t, group, groups, k, 0.0, K)
            attention, offset = _attention(value, c, k, inverse_tau, K)
            received = rate[:, None] * (value[None, :] - after[:, None])
            received -= tl.sum(attention * received, 0)[None, :]
            term += tl.sum(attention * (rate[:, None] - 2 * inverse_tau * received * offset), 0)
            if t == last - 1:
                soft = tl.sum(attention * after[:, None], 0)
                own = tl.sum(attention * (after[:, None] - soft[None, :]) * offset, 0) * (-2 * inverse_tau)
        if COUNTED:
            tl.store(out + group * m + at, own, mask=at < m)
            tl.store(shared + group * m + at, term, mask=at < m)
        else:
            grad = tl.load(upstream + group * m + at, mask=at < m, other=0.0).to(tl.float32)
            tl.store(out + group * m + at, (grad * own + term).to(out.dtype.element_ty), mask=at < m)


@triton.jit
def _bins(bits, at, size, m, GROUPED: tl.constexpr):
    """Bin of each weight of the flat range `at`: pattern + 65,536 group."""
    pattern = tl.load(bits + at, mask=at < size, other=0).to(tl.int32) & 0xFFFF
    if GROUPED:
        pattern += (at // m).to(tl.int32) * 65536
    return pattern


@triton.jit
def count(bits, counts, size, m, GROUPED: tl.constexpr, BLOCK: tl.constexpr):
    """Count the patterns int16 [groups, m] in int32 [groups, 65536], which starts at zero."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(counts + _bins(bits, at, size, m, GROUPED), 1, mask=at < size, sem="relaxed")


@triton.jit
def add_gradients(bits, grad, sums, size, m, GROUPED: tl.constexpr, BLOCK: tl.constexpr):
    """Sum the gradient [groups, m] by pattern in float32 [groups, 65536], which starts at zero."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(grad + at, mask=at < size, other=0.0).to(tl.float32)
    tl.atomic_add(sums + _bins(bits, at, size, m, GROUPED), values, mask=at < size, sem="relaxed")


@triton.jit
def look_up(bits, table, out, size, m, GROUPED: tl.constexpr, BLOCK: tl.constexpr):
    """Entry of table [groups, 65536] for each weight, to `out` [groups, m]; both of the weight's dtype."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    tl.store(out + at, tl.load(table + _bins(bits, at, size, m, GROUPED), mask=inside), mask=inside)


@triton.jit
def combine(bits, grad, factor, term, out, size, m, GROUPED: tl.constexpr, BLOCK: tl.constexpr):
    """Write grad * factor + term, the float32 tables [groups, 65536] looked up."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    bins = _bins(bits, at, size, m, GROUPED)
    values = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    values = values * tl.load(factor + bins, mask=inside) + tl.load(term + bins, mask=inside)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)
