"""Indices and LUTs that make the least error in a layer's output, not in its weights.

With inputs X [tokens, in] and H = X'X, a change E of the weight [out, in] changes the outputs by sum(E H * E) in all.
Columns are assigned one by one, and the error of each is spread over those that are left (GPTQ, arXiv 2210.17323;
Optimal Brain Surgeon). Coordinate descent then moves single indices as long as the error falls, and the LUTs are
refitted by least squares, given the indices (GPTVQ, arXiv 2402.15319; LNQ in arXiv 2505.07004).
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from edkm_export.clustering.native import Array, kernel, spread

__all__ = [
    "chosen",
    "compensated_indices",
    "descended_indices",
    "inverse_factor",
    "output_error",
    "refitted_centroids",
]

_COLUMNS = 128  # of a block, inside of which errors are spread at once; the rest is a matrix product
_ROWS = 16  # that a thread takes at a time


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U with U'U = inverse of H.

    The Cholesky factor of H with its axes reversed, reversed again, is an upper R with R R' = H; U is its inverse. That
    takes one factorization, and H itself is never inverted.

    Args:
        hessian: H, positive definite, float [n, n].

    Returns:
        Of the same dtype, [n, n].

    Raises:
        torch.linalg.LinAlgError: H is not positive definite.
    """
    reversed_factor = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    factor: Tensor = torch.linalg.solve_triangular(reversed_factor, identity, upper=True)
    return factor


def output_error(change: Tensor, hessian: Tensor) -> float:
    """sum(E H * E) of a change E of the weight: float [rows, n] and [n, n]."""
    return float(((change @ hessian) * change).sum(dtype=torch.float64))


def compensated_indices(weight: Tensor, centroids: Tensor, factor: Tensor) -> Tensor:
    """Nearest centroid of each weight, column by column, its error spread over the columns to the right of it.

    Args:
        weight: float32 or float64 [rows, n]; not changed.
        centroids: ascending, of the same dtype, [groups, k]; groups of consecutive rows share them.
        factor: as of `inverse_factor`, of the same dtype, [n, n].

    Returns:
        uint8 [rows, n].
    """
    rows, n = weight.shape
    work = weight.clone()
    indices = torch.empty(rows, n, dtype=torch.uint8)
    borders = ((centroids[:, 1:] + centroids[:, :-1]) / 2).numpy()
    lut, group_size = centroids.numpy(), rows // len(centroids)
    for start in range(0, n, _COLUMNS):
        some = slice(start, min(start + _COLUMNS, n))
        block, triangle = work[:, some].contiguous(), factor[some, some].contiguous()
        errors, found = torch.empty_like(block), torch.empty(block.shape, dtype=torch.uint8)
        run = functools.partial(
            _compensate,
            block.numpy(),
            triangle.numpy(),
            lut,
            borders,
            found.numpy(),
            errors.numpy(),
            group_size,
        )
        spread(run, rows, _ROWS)
        indices[:, some] = found
        work[:, some.stop :].addmm_(errors, factor[some, some.stop :], alpha=-1)
    return indices


def descended_indices(
    weight: Tensor, centroids: Tensor, hessian: Tensor, indices: Tensor, *, sweeps: int = 1
) -> tuple[Tensor, float]:
    """Move each index, one after the other, to where the error of the output is least, the others as they are.

    Args:
        weight: float32 or float64 [rows, n].
        centroids: ascending, of the same dtype, [groups, k].
        hessian: H with a positive diagonal, of the same dtype, [n, n].
        indices: to begin with, uint8 [rows, n]; not changed.
        sweeps: over all columns.

    Returns:
        Indices uint8 [rows, n], and the error sum(E H * E) that they leave, which is never larger than before.
    """
    rows, n = weight.shape
    indices = indices.clone()
    borders = ((centroids[:, 1:] + centroids[:, :-1]) / 2).numpy()
    lut, group_size = centroids.numpy(), rows // len(centroids)
    slope = (weight - chosen(centroids, indices)) @ hessian
    for _ in range(sweeps):
        for start in range(0, n, _COLUMNS):
            some = slice(start, min(start + _COLUMNS, n))
            # a copy: the matrix product below does in the slope what the kernel does in the block
            block, found = (
                slope[:, some].clone(memory_format=torch.contiguous_format),
                indices[:, some].contiguous(),
            )
            square, moves = hessian[some, some].contiguous(), torch.zeros_like(block)
            run = functools.partial(
                _descend,
                block.numpy(),
                square.numpy(),
                lut,
                borders,
                found.numpy(),
                moves.numpy(),
                group_size,
            )
            spread(run, rows, _ROWS)
            indices[:, some] = found
            slope.addmm_(moves, hessian[some], alpha=-1)
    change = weight - chosen(centroids, indices)
    return indices, float((slope * change).sum(dtype=torch.float64))


def refitted_centroids(
    weight: Tensor, centroids: Tensor, hessian: Tensor, indices: Tensor, *, steps: int = 4
) -> Tensor:
    """Centroids with less error of the output for given indices: least squares by conjugate gradients.

    The normal equations of a group are sum_r A_r' H A_r c = sum_r A_r' H w_r, with A_r the one-hot indices of row r.
    They are never formed: A_r c is a gather, and A_r' a sum over buckets. With `steps` of at least k they are solved,
    and each step makes the error less. A centroid without weights stays where it is.

    Args:
        weight: float32 or float64 [rows, n].
        centroids: to begin with, of the same dtype, [groups, k].
        hessian: H, of the same dtype, [n, n].
        indices: uint8 [rows, n].
        steps: of conjugate gradients.

    Returns:
        [groups, k], in the order of the indices.
    """
    groups, k = centroids.shape
    curvature = _sums(hessian.diagonal().expand_as(weight), indices, groups, k)
    # of a centroid without weights residual and image are zero, whatever it is scaled by
    scale = torch.where(curvature > 0, curvature, 1.0).reciprocal()
    residual = _sums((weight - chosen(centroids, indices)) @ hessian, indices, groups, k)
    found, direction = centroids.clone(), scale * residual
    power = (residual * direction).sum(1, keepdim=True)
    for _ in range(steps):
        image = _sums(chosen(direction, indices) @ hessian, indices, groups, k)
        bend = (direction * image).sum(1, keepdim=True)
        length = torch.where(bend > 0, power / bend, 0.0)
        found += length * direction
        residual -= length * image
        fresh = scale * residual
        next_power = (residual * fresh).sum(1, keepdim=True)
        direction = fresh + torch.where(power > 0, next_power / power, 0.0) * direction
        power = next_power
    return found


def chosen(centroids: Tensor, indices: Tensor) -> Tensor:
    """The centroid of each index: [groups, k] and uint8 [rows, n] -> [rows, n]."""
    found = torch.empty(indices.shape, dtype=centroids.dtype)
    arrays = centroids.contiguous().numpy(), indices.numpy(), found.numpy(), len(indices) // len(centroids)
    spread(lambda first, last: _decode(*arrays, first, last), len(indices), _ROWS)
    return found


def _sums(values: Tensor, indices: Tensor, groups: int, k: int) -> Tensor:
    """Sum of the values of each index in each group: [rows, n] -> [groups, k]."""
    sums = torch.zeros(groups, k, dtype=torch.float64)
    group_size = len(indices) // groups
    arrays = values.contiguous().numpy(), indices.numpy(), sums.numpy(), group_size
    spread(lambda first, last: _bucket(*arrays, first, last), groups, max(1, _ROWS // group_size))
    return sums.to(values.dtype)


@kernel
def _compensate(
    work: Array,
    factor: Array,
    lut: Array,
    borders: Array,
    indices: Array,
    errors: Array,
    group_size: int,
    first: int,
    last: int,
) -> None:
    for row in range(first, last):
        entries, edges = lut[row // group_size], borders[row // group_size]
        values = work[row]
        for j in range(len(values)):
            rank = np.searchsorted(edges, values[j])
            error = (values[j] - entries[rank]) / factor[j, j]
            for i in range(j + 1, len(values)):
                values[i] -= error * factor[j, i]
            indices[row, j] = rank
            errors[row, j] = error


@kernel
def _descend(
    slope: Array,
    hessian: Array,
    lut: Array,
    borders: Array,
    indices: Array,
    moves: Array,
    group_size: int,
    first: int,
    last: int,
) -> None:
    for row in range(first, last):
        entries, edges = lut[row // group_size], borders[row // group_size]
        values = slope[row]
        for j in range(len(values)):
            now = entries[indices[row, j]]
            rank = np.searchsorted(edges, now + values[j] / hessian[j, j])
            move = entries[rank] - now
            if move != 0.0:
                for i in range(len(values)):
                    values[i] -= move * hessian[j, i]
                indices[row, j] = rank
                moves[row, j] = move


@kernel
def _decode(lut: Array, indices: Array, values: Array, group_size: int, first: int, last: int) -> None:
    for row in range(first, last):
        entries = lut[row // group_size]
        for i in range(indices.shape[1]):
            values[row, i] = entries[indices[row, i]]


@kernel
def _bucket(values: Array, indices: Array, sums: Array, group_size: int, first: int, last: int) -> None:
    for group in range(first, last):
        for row in range(group * group_size, (group + 1) * group_size):
            for i in range(indices.shape[1]):
                sums[group, indices[row, i]] += values[row, i]
