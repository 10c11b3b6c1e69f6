"""Triton kernels of the DKM recurrence on weights, in float32. Imported only where a GPU is to be used.

Every pass reads the weights once and recomputes attention as a [K, BLOCK] tile: the centroids lie along the
registers of one thread, so that the softmax needs no exchange between threads. A group is shared by `parts`
programs; each writes its sums, and every program of the next pass adds up those of its group in a fixed order:
one launch a pass, no atomics, the same digits in each run.

Inside a tile weights and centroids are multiplied by s = sqrt(log2(e) / tau), so that attention is 2**-distance**2
and takes seven instructions an entry. Sums of offsets are divided by s where they are added up.

Layouts, all contiguous: weights [groups, m]; centroids and gradients [T + 1, groups, k]; masses [T, groups, k];
partial sums [groups, parts, 2, K], K the power of two from k.
"""
# Triton's language is untyped, and its kernels take pointers and sizes in long rows.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["close", "conclude", "iterate", "pull_apply", "pull_iteration", "soften"]

_FAR = tl.constexpr(1e18)  # a centroid that attracts nothing: its square is finite, and 2**-square is zero


@triton.jit
def row(pointer, t, group, groups, k, fill, K: tl.constexpr):
    """Row [K] of [T, groups, k]; `fill` behind k."""
    j = tl.arange(0, K)
    return tl.load(pointer + (t * groups + group) * k + j, mask=j < k, other=fill)


@triton.jit
def keep(pointer, t, group, groups, k, values, first, K: tl.constexpr):
    """Write a row of [T, groups, k], from the first program of a group only."""
    j = tl.arange(0, K)
    tl.store(pointer + (t * groups + group) * k + j, values, mask=(j < k) & first)


@triton.jit
def total(partial, which, group, parts, K: tl.constexpr, ROWS: tl.constexpr):
    """Add up sum `which` [K] of the programs of a group."""
    j = tl.arange(0, K)
    part = tl.arange(0, ROWS)
    start = partial + group * parts * 2 * K + which * K
    sums = tl.zeros([K, ROWS], tl.float32)
    for first in range(0, parts, ROWS):
        at = start + (first + part)[None, :] * 2 * K + j[:, None]
        sums += tl.load(at, mask=(first + part < parts)[None, :], other=0.0)
    return tl.sum(sums, 1)


@triton.jit
def scale_of(tau, group):
    """s, and 2 / (tau s), which turns a sum of scaled offsets into a gradient."""
    inverse = 1.0 / tl.load(tau + group)
    scale = tl.sqrt(inverse * 1.4426950408889634)
    return scale, 2.0 * inverse / scale


@triton.jit
def scaled(c, k, scale, K: tl.constexpr):
    """Centroids times s [K]; those behind k are far away."""
    return tl.where(tl.arange(0, K) < k, c * scale, _FAR)


@triton.jit
def attention(y, c):
    """Attention of y [BLOCK] to c [K], both scaled: its numerators, their inverse sum, and the offsets y - c."""
    offset = y[None, :] - c[:, None]
    distance = offset * offset
    power = tl.exp2(tl.min(distance, 0)[None, :] - distance)
    return power, 1.0 / tl.sum(power, 0), offset


@triton.jit
def pulled(power, inverse, offset, y, after, rate):
    """Gradient of the logits through c^{t+1} = F(c^t, x) times the offsets [K, BLOCK], and what each x receives
    through the masses [BLOCK]; `rate` is gradient / S^t, `after` c^{t+1}, scaled.
    """
    share = power * inverse[None, :]
    received = rate[:, None] * (y[None, :] - after[:, None])
    received = (received - tl.sum(share * received, 0)[None, :]) * share
    return received * offset, tl.sum(share * rate[:, None], 0)


@triton.jit
def _leave(partial, which, group, part, parts, values, K: tl.constexpr):
    """Write sum `which` of this program."""
    tl.store(partial + ((group * parts + part) * 2 + which) * K + tl.arange(0, K), values)


@triton.jit
def moved(mass, moment, c, least):
    """c^{t+1} from the sums of pass t, in the units of c; a centroid without mass stays."""
    return tl.where(mass > least, moment / mass, c)


@triton.jit
def _next(
    centroids, masses, partial, t, group, groups, k, parts, least, scale, first,
    K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """c^t from the sums of pass t - 1. Keeps it, and S^{t-1}."""
    mass = total(partial, 0, group, parts, K, ROWS)
    moment = total(partial, 1, group, parts, K, ROWS) / scale
    c = moved(mass, moment, row(centroids, t - 1, group, groups, k, 0.0, K), least)
    keep(centroids, t, group, groups, k, c, first, K)
    keep(masses, t - 1, group, groups, k, mass, first, K)
    return c


@triton.jit(do_not_specialize=["t"])
def iterate(
    x, tau, centroids, masses, before, partial, t, m, chunk, groups, k, parts, least,
    FIRST: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Pass t of the forward recurrence: c^t from `before`, its sums to `partial`."""
    part = tl.program_id(0) % parts
    group = (tl.program_id(0) // parts).to(tl.int64)
    scale, _ = scale_of(tau, group)
    if FIRST:
        c = row(centroids, 0, group, groups, k, 0.0, K)
    else:
        c = _next(centroids, masses, before, t, group, groups, k, parts, least, scale, part == 0, K, ROWS)
    c = scaled(c, k, scale, K)
    mass = tl.zeros([K, BLOCK], tl.float32)
    moment = tl.zeros([K, BLOCK], tl.float32)
    for start in range(part * chunk, tl.minimum(part * chunk + chunk, m), BLOCK):
        at = start + tl.arange(0, BLOCK)
        y = tl.load(x + group * m + at, mask=at < m, other=0.0).to(tl.float32) * scale
        power, inverse, _offset = attention(y, c)
        inverse = tl.where(at < m, inverse, 0.0)
        mass += power * inverse[None, :]
        moment += power * (inverse * y)[None, :]
    _leave(partial, 0, group, part, parts, tl.sum(mass, 1), K)
    _leave(partial, 1, group, part, parts, tl.sum(moment, 1), K)


@triton.jit(do_not_specialize=["t"])
def conclude(
    tau, centroids, masses, before, t, groups, k, parts, least,
    K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Keep c^T and S^{T-1}, t = T, from the sums of the last pass `before`; one program a group."""
    group = tl.program_id(0).to(tl.int64)
    scale, _ = scale_of(tau, group)
    _next(centroids, masses, before, t, group, groups, k, parts, least, scale, True, K, ROWS)


@triton.jit(do_not_specialize=["t"])
def soften(
    x, tau, centroids, masses, before, out, t, m, chunk, groups, k, parts, least,
    K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Last pass, t = T: c^T from `before`, then A^{T-1} c^T to `out` [groups, m]."""
    part = tl.program_id(0) % parts
    group = (tl.program_id(0) // parts).to(tl.int64)
    scale, _ = scale_of(tau, group)
    c = scaled(row(centroids, t - 1, group, groups, k, 0.0, K), k, scale, K)
    last = _next(centroids, masses, before, t, group, groups, k, parts, least, scale, part == 0, K, ROWS)
    for start in range(part * chunk, tl.minimum(part * chunk + chunk, m), BLOCK):
        at = start + tl.arange(0, BLOCK)
        y = tl.load(x + group * m + at, mask=at < m, other=0.0).to(tl.float32) * scale
        power, inverse, _offset = attention(y, c)
        soft = tl.sum(power * last[:, None], 0) * inverse
        tl.store(out + group * m + at, soft.to(out.dtype.element_ty), mask=at < m)


@triton.jit(do_not_specialize=["t"])
def pull_apply(
    x, upstream, tau, centroids, partial, collected, t, m, chunk, groups, k, parts,
    COLLECT: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Through f = A(c^{T-1}) c^T, t = T: sums for the gradients of c^T and of c^{T-1}.

    With COLLECT, what the weights receive at fixed centroids, G d, goes to `collected`, float32 [groups, m].
    """
    part = tl.program_id(0) % parts
    group = (tl.program_id(0) // parts).to(tl.int64)
    scale, pull = scale_of(tau, group)
    c = scaled(row(centroids, t - 1, group, groups, k, 0.0, K), k, scale, K)
    last = row(centroids, t, group, groups, k, 0.0, K)
    of_last = tl.zeros([K, BLOCK], tl.float32)
    of_c = tl.zeros([K, BLOCK], tl.float32)
    for start in range(part * chunk, tl.minimum(part * chunk + chunk, m), BLOCK):
        at = start + tl.arange(0, BLOCK)
        y = tl.load(x + group * m + at, mask=at < m, other=0.0).to(tl.float32) * scale
        received = tl.load(upstream + group * m + at, mask=at < m, other=0.0).to(tl.float32)
        power, inverse, offset = attention(y, c)
        soft = tl.sum(power * last[:, None], 0) * inverse
        share = power * (inverse * received)[None, :]
        of_last += share
        share *= (last[:, None] - soft[None, :]) * offset
        of_c += share
        if COLLECT:
            tl.store(collected + group * m + at, -pull * tl.sum(share, 0), mask=at < m)
    _leave(partial, 0, group, part, parts, tl.sum(of_last, 1), K)
    _leave(partial, 1, group, part, parts, tl.sum(of_c, 1), K)


@triton.jit
def _gradient(
    gradients, masses, applied, before, t, last, group, groups, k, parts, least, pull, first,
    K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradient of c^t: from `pull_apply` at t = T, otherwise from pass t of `pull_iteration`. Keeps it.

    gradients[T] holds the upstream gradient of c^T beforehand, and stays as it is: every program reads it.
    """
    if t == last:
        grad = row(gradients, t, group, groups, k, 0.0, K) + total(applied, 0, group, parts, K, ROWS)
    else:
        alive = row(masses, t, group, groups, k, 1.0, K) > least
        grad = pull * total(before, 0, group, parts, K, ROWS)
        if t == last - 1:
            grad += pull * total(applied, 1, group, parts, K, ROWS)
            after = row(gradients, last, group, groups, k, 0.0, K)
            after += total(applied, 0, group, parts, K, ROWS)
        else:
            after = row(gradients, t + 1, group, groups, k, 0.0, K)
        grad += tl.where(alive, 0.0, after)  # a centroid that stayed hands its gradient on
        keep(gradients, t, group, groups, k, grad, first, K)
    return grad


@triton.jit(do_not_specialize=["t", "last"])
def pull_iteration(
    x, tau, centroids, masses, gradients, applied, before, partial, collected, out, t, last, m, chunk, groups, k,
    parts, least,
    K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Through c^{t+1} = F(c^t, x): sums for the gradient of c^t, and what the weights receive.

    The latter is added to `collected`, float32 [groups, m], to which `out` is the same tensor or, at t = 0, that of
    the result.
    """
    part = tl.program_id(0) % parts
    group = (tl.program_id(0) // parts).to(tl.int64)
    scale, pull = scale_of(tau, group)
    grad = _gradient(
        gradients,
        masses,
        applied,
        before,
        t + 1,
        last,
        group,
        groups,
        k,
        parts,
        least,
        pull,
        part == 0,
        K,
        ROWS,
    )
    mass = row(masses, t, group, groups, k, 0.0, K)
    rate = tl.where(mass > least, grad / mass, 0.0)
    c = scaled(row(centroids, t, group, groups, k, 0.0, K), k, scale, K)
    after = row(centroids, t + 1, group, groups, k, 0.0, K) * scale
    of_c = tl.zeros([K, BLOCK], tl.float32)
    for start in range(part * chunk, tl.minimum(part * chunk + chunk, m), BLOCK):
        at = start + tl.arange(0, BLOCK)
        y = tl.load(x + group * m + at, mask=at < m, other=0.0).to(tl.float32) * scale
        received = tl.load(collected + group * m + at, mask=at < m, other=0.0)
        power, inverse, offset = attention(y, c)
        inverse = tl.where(at < m, inverse, 0.0)
        push, through = pulled(power, inverse, offset, y, after, rate)
        of_c += push
        # The offsets of `push` were scaled twice: once as a derivative, once in `pulled`.
        received += through - (pull / scale) * tl.sum(push, 0)
        tl.store(out + group * m + at, received.to(out.dtype.element_ty), mask=at < m)
    _leave(partial, 0, group, part, parts, tl.sum(of_c, 1) / scale, K)


@triton.jit(do_not_specialize=["last"])
def close(
    tau,
    masses,
    gradients,
    applied,
    before,
    last,
    groups,
    k,
    parts,
    least,
    K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The gradient of c^0, from the sums of pass 0; one program a group."""
    group = tl.program_id(0).to(tl.int64)
    _, pull = scale_of(tau, group)
    _gradient(
        gradients, masses, applied, before, 0, last, group, groups, k, parts, least, pull, True, K, ROWS
    )
