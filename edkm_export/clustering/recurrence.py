"""The DKM recurrence on points with multiplicities, and its exact gradient, block by block.

    A^t = softmax_j(-|x_u - c^t_j|**2 / tau)     S^t_j = sum_u n_u A^t_uj
    c^{t+1}_j = (sum_u n_u A^t_uj x_u) / S^t_j   f_u = sum_j A^{T-1}_uj c^T_j

(DKM, arXiv 2108.12659, section 3.2.) The points are the weights themselves (`streaming`) or the entries of a
histogram (`histogram`). Attention is recomputed wherever it is needed and never outlives its block; what is
kept is the centroids and the masses S of each iteration. A centroid that attracts no mass stays where it is.

Layout: attention is [groups, k, points], with the long axis innermost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Points", "Trace", "apply", "least_mass", "pull_back", "slope", "unroll"]

# "converge": stop when no centroid moves by more than this many ulps of the largest centroid of its group.
_TOLERANCE_ULPS = 32.0
_MOST_ITERATIONS = 2000

# Entries of attention in a block: few enough for the cache of a CPU, many enough to fill a GPU.
_HOST_BLOCK_ENTRIES = 1 << 18
_DEVICE_BLOCK_ENTRIES = 1 << 24
_LEAST_BLOCK_ENTRIES = 1 << 14


def least_mass(dtype: torch.dtype) -> float:
    """Mass below which a centroid stays where it is: there, quotients by the mass would lose their digits."""
    limits = torch.finfo(dtype)
    return limits.tiny / limits.eps


@dataclass(frozen=True)
class Points:
    """Points of several groups.

    Attributes:
        values: [groups, points, dim], any float dtype.
        counts: multiplicities in the compute dtype [groups, points]; None means one each.
        temperature: tau in the compute dtype [groups].
    """

    values: Tensor
    counts: Tensor | None
    temperature: Tensor

    def blocks(self, k: int) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yield (range, values [groups, block, dim] in the compute dtype, counts [groups, block])."""
        groups, size, _ = self.values.shape
        entries = _DEVICE_BLOCK_ENTRIES
        if self.values.device.type == "cpu":
            entries = _HOST_BLOCK_ENTRIES
            if self.counts is not None:  # a block shall not take more memory than the table of values
                entries = min(entries, max(groups * size, _LEAST_BLOCK_ENTRIES))
        stride = max(1, entries // (groups * k))
        for start in range(0, size, stride):
            some = slice(start, start + stride)
            yield (
                some,
                self.values[:, some].to(self.temperature.dtype),
                None if self.counts is None else self.counts[:, some],
            )

    def total(self, sums: Tensor) -> Tensor:
        """Sums over all points of each group, from those over the points that are here [groups, ...]."""
        return sums


@dataclass(frozen=True)
class Trace:
    """What the recurrence leaves behind.

    Attributes:
        centroids: c^0 ... c^T [T + 1, groups, k, dim]; after "converge" only c^{T-1} and c^T.
        masses: S^0 ... S^{T-1} [T, groups, k]; after "converge" only the last.
    """

    centroids: Tensor
    masses: Tensor


def _offset(x: Tensor, centroids: Tensor, axis: int) -> Tensor:
    """Component `axis` of x_u - c_j: [groups, k, points]."""
    return x[:, None, :, axis] - centroids[:, :, None, axis]


def _attention(x: Tensor, centroids: Tensor, tau: Tensor) -> Tensor:
    """Compute A: [groups, k, points]."""
    distance = _offset(x, centroids, 0).square_()
    for axis in range(1, x.shape[2]):
        distance += _offset(x, centroids, axis).square_()
    return torch.softmax(distance.div_(-tau[:, None, None]), dim=1)


def _weighed(values: Tensor, counts: Tensor | None) -> Tensor:
    """Multiply [groups, k, points] by the counts."""
    return values if counts is None else values * counts[:, None]


def _iterate(points: Points, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """c^{t+1} [groups, k, dim] and S^t [groups, k] from c^t."""
    groups, k, dim = centroids.shape
    mass = centroids.new_zeros(groups, k)
    moment = torch.zeros_like(centroids)
    for _, x, counts in points.blocks(k):
        attention = _weighed(_attention(x, centroids, points.temperature), counts)
        mass += attention.sum(2)
        for axis in range(dim):
            moment[..., axis] += (attention * x[:, None, :, axis]).sum(2)
    mass, moment = points.total(mass), points.total(moment)
    alive = (mass > least_mass(mass.dtype))[..., None]
    return torch.where(alive, moment / mass[..., None], centroids), mass


def unroll(points: Points, centroids: Tensor, iterations: int | None) -> Trace:
    """Iterate.

    Args:
        points: the points.
        centroids: c^0 in the compute dtype [groups, k, dim].
        iterations: T, at least 1; None iterates to a fixed point.
    """
    iterates, masses = [centroids], []
    if iterations is not None:
        for _ in range(iterations):
            centroids, mass = _iterate(points, centroids)
            iterates.append(centroids)
            masses.append(mass)
        return Trace(torch.stack(iterates), torch.stack(masses))
    tolerance = _TOLERANCE_ULPS * torch.finfo(centroids.dtype).eps
    for _ in range(_MOST_ITERATIONS):
        before = centroids
        centroids, mass = _iterate(points, before)
        moved, size = (centroids - before).abs().amax((1, 2)), centroids.abs().amax((1, 2))
        if not bool((moved > tolerance * size).any()):
            break
    return Trace(torch.stack([before, centroids]), mass[None])


def apply(points: Points, trace: Trace, out: Tensor) -> None:
    """Write f = A^{T-1} c^T to `out` [groups, points, dim], in its dtype."""
    before, after = trace.centroids[-2], trace.centroids[-1]
    for some, x, _ in points.blocks(after.shape[1]):
        attention = _attention(x, before, points.temperature)
        for axis in range(out.shape[2]):
            out[:, some, axis] = (attention * after[:, :, None, axis]).sum(1)


def slope(points: Points, trace: Trace) -> Tensor:
    """Differentiate f_u by x_u at fixed centroids, for dim = 1: [groups, points] in the compute dtype."""
    before, after = trace.centroids[-2], trace.centroids[-1]
    out = points.temperature.new_empty(points.values.shape[:2])
    for some, x, _ in points.blocks(after.shape[1]):
        attention = _attention(x, before, points.temperature)
        soft = (attention * after).sum(1, keepdim=True)
        # Centred twice, so that no large terms cancel.
        out[:, some] = (attention * (after - soft) * _offset(x, before, 0)).sum(1)
    return out * (-2 / points.temperature)[:, None]


def pull_back(
    points: Points,
    trace: Trace,
    upstream: Tensor,
    grad_last: Tensor,
    out: Tensor,
    *,
    implicit: bool,
    through: bool,
) -> Tensor:
    """Gradient of the recurrence.

    Args:
        points: the points.
        trace: from `unroll`.
        upstream: gradient of f summed over the weights of each point [groups, points, dim], any dtype.
        grad_last: gradient of c^T itself [groups, k, dim].
        out: the gradient that one weight of each point receives through the centroids is added to it
            [groups, points, dim], in the compute dtype.
        implicit: the trace is a fixed point; use the implicit function theorem instead of the iterations.
        through: add the gradient through f at fixed centroids, too.

    Returns:
        Gradient of c^0 [groups, k, dim].
    """
    grad_after, grad_before = _pull_back_apply(points, trace, upstream, out if through else None)
    grad = grad_after + grad_last
    if implicit:
        alive = trace.masses[-1] > least_mass(grad.dtype)
        grad = grad + grad_before
        adjoint = _solve_adjoint(points, trace, grad, alive)
        _pull_back_iteration(points, trace, -1, adjoint, out)
        return torch.where(alive[..., None], 0.0, grad)
    for t in range(len(trace.masses) - 1, -1, -1):
        grad = _pull_back_iteration(points, trace, t, grad, out)
        if t == len(trace.masses) - 1:
            grad += grad_before
    return grad


def _logit_gradient(attention: Tensor, grad_attention: Tensor) -> Tensor:
    """Gradient of the softmax's input; both [groups, k, points]. Overwrites `grad_attention`."""
    mean = (attention * grad_attention).sum(1, keepdim=True)
    return grad_attention.sub_(mean).mul_(attention)


def _pull_back_apply(
    points: Points, trace: Trace, upstream: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Through f = A(c^{T-1}) c^T: the gradients of c^T and of c^{T-1} [groups, k, dim]."""
    before, after = trace.centroids[-2], trace.centroids[-1]
    dim, factor = after.shape[2], (2 / points.temperature)[:, None]
    grad_after, grad_before = torch.zeros_like(after), torch.zeros_like(before)
    for some, x, _ in points.blocks(after.shape[1]):
        attention = _attention(x, before, points.temperature)
        received = upstream[:, some].to(x.dtype)
        grad_attention = torch.zeros_like(attention)
        for axis in range(dim):
            grad_after[..., axis] += (attention * received[:, None, :, axis]).sum(2)
            # Relative to the point: the softmax does not see a shift, and the digits are kept.
            shifted = after[:, :, None, axis] - x[:, None, :, axis]
            grad_attention += shifted.mul_(received[:, None, :, axis])
        grad_logits = _logit_gradient(attention, grad_attention)
        for axis in range(dim):
            pull = grad_logits * _offset(x, before, axis)
            grad_before[..., axis] += factor * pull.sum(2)
            if out is not None:
                out[:, some, axis] -= factor * pull.sum(1)
    return points.total(grad_after), points.total(grad_before)


def _pull_back_iteration(points: Points, trace: Trace, t: int, grad: Tensor, out: Tensor) -> Tensor:
    """Through c^{t+1} = F(c^t, x): adds to `out`, returns the gradient of c^t; grad [groups, k, dim]."""
    before, after = (trace.centroids[t - 1], trace.centroids[t]) if t < 0 else trace.centroids[t : t + 2]
    dim, factor = after.shape[2], (2 / points.temperature)[:, None]
    alive = (trace.masses[t] > least_mass(grad.dtype))[..., None]
    rate = torch.where(alive, grad / trace.masses[t][..., None], 0.0)
    pulled = torch.zeros_like(grad)
    for some, x, counts in points.blocks(after.shape[1]):
        attention = _attention(x, before, points.temperature)
        grad_attention = torch.zeros_like(attention)
        for axis in range(dim):
            grad_attention += _offset(x, after, axis).mul_(rate[:, :, None, axis])
        grad_logits = _logit_gradient(attention, grad_attention)
        for axis in range(dim):
            pull = grad_logits * _offset(x, before, axis)
            out[:, some, axis] += (attention * rate[:, :, None, axis]).sum(1) - factor * pull.sum(1)
            pulled[..., axis] += factor * _weighed(pull, counts).sum(2)
    return points.total(pulled) + torch.where(alive, 0.0, grad)


def _solve_adjoint(points: Points, trace: Trace, grad: Tensor, alive: Tensor) -> Tensor:
    """Solve (I - J^T) a = grad, J the Jacobian of F at the fixed point: [groups, k, dim]."""
    before, after = trace.centroids[-2], trace.centroids[-1]
    groups, k, dim = after.shape
    jacobian = after.new_zeros(groups, k, dim, k, dim)
    factor = (2 / points.temperature)[:, None, None]
    inverse_mass = torch.where(alive, 1 / trace.masses[-1], 0.0)[:, :, None]
    own = torch.arange(k, device=after.device)
    for _, x, counts in points.blocks(k):
        attention = _attention(x, before, points.temperature)
        share = _weighed(attention * inverse_mass, counts)
        for i in range(dim):
            residual = share * _offset(x, after, i)
            for j in range(dim):
                push = attention * _offset(x, before, j)
                jacobian[:, :, i, :, j] -= factor * torch.bmm(residual, push.transpose(1, 2))
                jacobian[:, own, i, own, j] += factor[..., 0] * (residual * _offset(x, before, j)).sum(2)
    size = k * dim
    matrix = torch.eye(size, dtype=grad.dtype, device=grad.device) - jacobian.view(groups, size, size).mT
    adjoint: Tensor = torch.linalg.solve(matrix, grad.reshape(groups, size, 1))
    return adjoint.view(groups, k, dim)
