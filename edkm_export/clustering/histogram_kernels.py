"""Triton kernels of the DKM recurrence on the histogram of 16-bit weights. Imported only where a GPU is to be used.

Weights are counted in bins: one for each magnitude pattern and sign. A bfloat16 has 32,768 magnitudes, of which
the 4,095 below the largest one of its group span 2**32; what is smaller counts as zero, far below what float32
arithmetic on the largest weight can tell. So 8,192 bins do, few enough for one program to run a group's whole
recurrence, and for copies of the bins on which programs count without waiting for each other. float16 has no
such range and gets all of its 65,536 patterns.

Layouts, all contiguous: weights [groups, m]; counts int32 and tables [groups, 2 HALF], negative ones in the second
half; `largest`, the largest magnitude pattern of each group, int32 [groups]; the rest as in `kernels`.
"""
# Triton's language is untyped, and its kernels take pointers and sizes in long rows.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from edkm_export.clustering.kernels import attention, keep, moved, pulled, row, scale_of, scaled, total

__all__ = ["combine", "count", "find_largest", "look_up", "settle", "unsettle"]


@triton.jit
def _lowest(largest, group, HALF: tl.constexpr):
    """Magnitude pattern of bin 0: it and all below count as zero."""
    return tl.maximum(tl.load(largest + group) - (HALF - 1), 0)


@triton.jit
def _bins(weight, at, inside, low, HALF: tl.constexpr):
    """Bin of each weight [BLOCK]."""
    bits = tl.load(weight + at, mask=inside, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)
    size = tl.maximum((bits & 0x7FFF) - low, 0)
    return tl.where(bits < 0, size + HALF, size)


@triton.jit
def _values(bins, low, like, HALF: tl.constexpr):
    """Value of each bin [BLOCK] in float32; `like` points to the 16-bit type."""
    size = bins & (HALF - 1)
    bits = tl.where(size > 0, size + low, 0) | tl.where(bins >= HALF, 0x8000, 0)
    return bits.to(tl.int16).to(like.dtype.element_ty, bitcast=True).to(tl.float32)


@triton.jit
def _place(m, blocks, BLOCK: tl.constexpr):
    """Group of this program, and the range of its weights: in the group and in all."""
    group = (tl.program_id(0) // blocks).to(tl.int64)
    inside = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    return group, inside < m, group * m + inside


@triton.jit
def find_largest(weight, largest, m, blocks, BLOCK: tl.constexpr):
    """Largest magnitude pattern of each group; `largest` starts at zero."""
    group, inside, at = _place(m, blocks, BLOCK)
    bits = tl.load(weight + at, mask=inside, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)
    tl.atomic_max(largest + group, tl.max(bits & 0x7FFF), sem="relaxed")


@triton.jit
def count(weight, largest, counts, m, blocks, copies, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Count in int32 [groups, copies, 2 HALF], which starts at zero."""
    group, inside, at = _place(m, blocks, BLOCK)
    bins = _bins(weight, at, inside, _lowest(largest, group, HALF), HALF)
    copy = group * copies + tl.program_id(0) % copies
    tl.atomic_add(counts + copy * (2 * HALF) + bins, 1, mask=inside, sem="relaxed")


@triton.jit
def settle(
    counts, largest, tau, centroids, masses, table, last, groups, k, least,
    HALF: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The forward recurrence of a group in one program; A^{T-1} c^T of each bin to `table`, in the weights' type."""
    group = tl.program_id(0).to(tl.int64)
    low = _lowest(largest, group, HALF)
    scale, _ = scale_of(tau, group)
    now = row(centroids, 0, group, groups, k, 0.0, K)
    for t in range(last):
        c = scaled(now, k, scale, K)
        mass = tl.zeros([K, BLOCK], tl.float32)
        moment = tl.zeros([K, BLOCK], tl.float32)
        for start in range(0, 2 * HALF, BLOCK):
            at = start + tl.arange(0, BLOCK)
            n = tl.load(counts + group * (2 * HALF) + at)
            y = tl.where(n > 0, _values(at, low, table, HALF), 0.0) * scale
            power, inverse, _offset = attention(y, c)
            inverse *= n.to(tl.float32)
            mass += power * inverse[None, :]
            moment += power * (inverse * y)[None, :]
        sums = tl.sum(mass, 1)
        now = moved(sums, tl.sum(moment, 1) / scale, now, least)
        keep(centroids, t + 1, group, groups, k, now, True, K)
        keep(masses, t, group, groups, k, sums, True, K)
    tl.debug_barrier()  # c^{T-1} was written by other threads of this program
    c = scaled(row(centroids, last - 1, group, groups, k, 0.0, K), k, scale, K)
    for start in range(0, 2 * HALF, BLOCK):
        at = start + tl.arange(0, BLOCK)
        y = _values(at, low, table, HALF) * scale
        power, inverse, _offset = attention(y, c)
        soft = tl.sum(power * now[:, None], 0) * inverse
        tl.store(table + group * (2 * HALF) + at, soft.to(table.dtype.element_ty))


@triton.jit
def look_up(weight, largest, table, out, m, blocks, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Entry of the table for each weight, to `out` [groups, m]."""
    group, inside, at = _place(m, blocks, BLOCK)
    bins = _bins(weight, at, inside, _lowest(largest, group, HALF), HALF)
    tl.store(out + at, tl.load(table + group * (2 * HALF) + bins, mask=inside), mask=inside)


@triton.jit
def unsettle(
    weight, counts, largest, tau, centroids, masses, gradients, applied, own, shared, last, groups, k, parts, least,
    HALF: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The backward recurrence of a group in one program, from the sums of `pull_apply`.

    Writes the tables d to `own` and h to `shared`, float32, and the gradient of c^0 to row 0 of `gradients`, whose
    row T holds that of c^T.
    """
    group = tl.program_id(0).to(tl.int64)
    low = _lowest(largest, group, HALF)
    scale, pull = scale_of(tau, group)
    of_last, of_before = total(applied, 0, group, parts, K, ROWS), total(applied, 1, group, parts, K, ROWS)
    grad = row(gradients, last, group, groups, k, 0.0, K) + of_last
    for back in range(last):
        t = last - 1 - back
        mass = row(masses, t, group, groups, k, 0.0, K)
        rate = tl.where(mass > least, grad / mass, 0.0)
        c = scaled(row(centroids, t, group, groups, k, 0.0, K), k, scale, K)
        after = row(centroids, t + 1, group, groups, k, 0.0, K)
        of_c = tl.zeros([K, BLOCK], tl.float32)
        for start in range(0, 2 * HALF, BLOCK):
            at = start + tl.arange(0, BLOCK)
            bins = group * (2 * HALF) + at
            n = tl.load(counts + bins)
            y = tl.where(n > 0, _values(at, low, weight, HALF), 0.0) * scale
            power, inverse, offset = attention(y, c)
            push, here = pulled(power, inverse, offset, y, after * scale, rate)
            of_c += push * n.to(tl.float32)[None, :]
            here -= (pull / scale) * tl.sum(push, 0)
            if back == 0:
                soft = tl.sum(power * after[:, None], 0) * inverse
                slope = tl.sum(power * (after[:, None] - soft[None, :]) * offset, 0) * inverse
                tl.store(own + bins, -pull * slope)
            else:
                here += tl.load(shared + bins)
            tl.store(shared + bins, here)
        before = (pull / scale) * tl.sum(of_c, 1) + tl.where(mass > least, 0.0, grad)
        grad = before + tl.where(back == 0, 1.0, 0.0) * pull * of_before
        tl.debug_barrier()  # the next pass may read `shared` with other threads
    keep(gradients, 0, group, groups, k, grad, True, K)


@triton.jit
def combine(weight, largest, grad, own, shared, out, m, blocks, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Write G d + h, the tables looked up, to `out` [groups, m]."""
    group, inside, at = _place(m, blocks, BLOCK)
    bins = group * (2 * HALF) + _bins(weight, at, inside, _lowest(largest, group, HALF), HALF)
    values = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    values = values * tl.load(own + bins, mask=inside) + tl.load(shared + bins, mask=inside)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)
