"""One weight as LUTs and indices that make the least error in its layer's output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from edkm_export.clustering import hard_assign, optimal_centroids
from edkm_export.clustering.compensation import (
    chosen,
    compensated_indices,
    descended_indices,
    inverse_factor,
    output_error,
    refitted_centroids,
)
from edkm_export.errors import PaletteError
from edkm_export.lut_grid import Rounded, round_to_grid
from edkm_export.palette import PalettizedTensor, all_finite, check_grouping
from edkm_export.recipe import Rule

__all__ = ["ROUNDS", "damped", "damping", "makes_up", "palettize_compensated", "palettize_vocabulary"]

_FLOOR = 1e-6  # of the mean over all, for inputs that are always zero

ROUNDS = 2
"""How often LUTs are refitted and indices moved; a third gains 1% of the error."""


_LARGEST_BITS = 6  # with more there is hardly an error to make up for
_WIDEST = 6144  # columns; H and what is made of it are five such squares in float32, 0.7 GiB
_RANGE = 1 << 22  # weights of a vocabulary that are palettized at a time


def makes_up(rule: Rule, columns: int) -> bool:
    """Whether a linear layer of so many inputs is to make up for its errors: at 8 bits it has hardly any.

    Args:
        rule: of the layer.
        columns: its inputs; of more than 6,144, H takes too much memory.
    """
    return rule.bits <= _LARGEST_BITS and columns <= _WIDEST


@dataclass(frozen=True)
class _Candidate:
    """LUTs on their grid, indices uint8 [out, in], and their error under the damped H."""

    luts: Rounded
    indices: Tensor
    error: float


def damping(bits: int) -> float:
    """What share of its mean square is added to that of each input: 4^(bits - 4), at most one.

    Some thousands of tokens say how large each channel is, but only roughly how channels go together. What that makes
    of the error does not depend on the bits, while the error itself falls by a factor of four with each. With a share
    of 0.01, SmolLM2 at 4 bits was further from the original, on other texts, than without compensation.
    It is a share of the channel's own, not of the mean over all: where one input is a hundred times as large as the
    others, that would be all that the others weigh.
    """
    return float(min(1.0, 4.0 ** (bits - 4)))


def damped(hessian: Tensor, share: float, samples: int | None = None) -> Tensor:
    """H with more on its diagonal, so that it is positive definite; the identity in place of zero.

    Args:
        hessian: symmetric, positive semidefinite, float [n, n].
        share: of each input's mean square, see `damping`.
        samples: how many inputs it is the mean of. From fewer than n the damping grows with the square of what is
            missing. None: enough.
    """
    mean = float(hessian.diagonal().mean())
    share *= max(1.0, len(hessian) / (samples or len(hessian))) ** 2
    result = hessian.clone()
    result.diagonal().mul_(1 + share).add_(mean * _FLOOR if mean > 0 else 1.0)
    return result


@torch.no_grad()
def palettize_compensated(
    name: str, weight: Tensor, rule: Rule, hessian: Tensor, *, samples: int | None = None
) -> PalettizedTensor:
    """Palettize the weight of a linear layer whose inputs are known.

    Centroids begin at the exact k-means weighted by 1 / diag(inverse of H): how much an error of each column costs when
    those after it make up for it. Columns are assigned from the one with the largest inputs on, then LUTs are refitted
    and indices moved, in turns. Of all that is met, what has the least error of the output is kept; nearest centroids
    are among it.

    Args:
        name: of the parameter.
        weight: float [out, in]; it is clustered on the CPU.
        rule: bits, groups and LUT dtype.
        hessian: H = X'X of inputs X [tokens, in], up to a factor; float [in, in]. It is damped here.
        samples: tokens of X, see `damped`.

    Raises:
        PaletteError: shapes that do not fit, the group size does not divide the rows, or H is not finite.
    """
    if weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
        raise PaletteError(
            f"{name}: is {weight.dtype} {list(weight.shape)}, expected floating point [out, in]."
        )
    rows, columns = weight.shape
    if hessian.shape != (columns, columns) or not all_finite(hessian):
        raise PaletteError(
            f"{name}: the Hessian of its inputs is {list(hessian.shape)}, expected finite [{columns}, {columns}]."
        )
    check_grouping(name, rows, rule.group_size)
    order = hessian.diagonal().argsort(descending=True, stable=True).cpu()
    values = weight.detach().cpu().float()[:, order]
    curvature = damped(hessian.detach().cpu().float()[order][:, order], damping(rule.bits), samples)
    best = min(_candidates(values, curvature, rule), key=lambda each: each.error)
    indices = torch.empty_like(best.indices)
    indices[:, order] = best.indices
    groups = len(best.luts.lut)
    return PalettizedTensor.from_indices(
        name,
        best.luts.lut.view(groups, 1, -1, 1),
        indices,
        lut_scale=None if best.luts.scale is None else best.luts.scale.view(groups, 1),
        lut_dtype=rule.lut_dtype,
    )


def palettize_vocabulary(
    name: str,
    weight: Tensor,
    rule: Rule,
    hessian: Tensor,
    *,
    samples: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> PalettizedTensor:
    """`palettize_compensated` of an embedding or an output head, a range of rows at a time, which bounds its memory.

    Rows share nothing but the LUTs of their groups, so that ranges of whole groups can be palettized apart.

    Args:
        name: of the parameter.
        weight: float [rows, in].
        rule: bits, groups and LUT dtype.
        hessian: float [in, in]; of an embedding the mean of g g' of the loss gradients g of what is looked up.
        samples: tokens that it is the mean of.
        advance: called with the number of weights of each range.

    Raises:
        PaletteError: as there.
    """
    rows, columns = weight.shape
    check_grouping(name, rows, rule.group_size)
    unit = rule.group_size or rows
    count = max(1, _RANGE // (unit * columns)) * unit
    parts = []
    for start in range(0, rows, count):
        part = weight[start : start + count]
        parts.append(palettize_compensated(name, part, rule, hessian, samples=samples))
        if advance is not None:
            advance(part.numel())
    scales = [part.lut_scale for part in parts if part.lut_scale is not None]
    return PalettizedTensor.from_indices(
        name,
        torch.cat([part.lut for part in parts]),
        torch.cat([part.unpack_indices() for part in parts]),
        lut_scale=torch.cat(scales) if scales else None,
        lut_dtype=rule.lut_dtype,
    )


def _candidates(weight: Tensor, hessian: Tensor, rule: Rule) -> Iterator[_Candidate]:
    """From the nearest centroids on; weight [rows, n] and H [n, n] float32, in the order of assignment."""
    rows, n = weight.shape
    groups = rows // (rule.group_size or rows)
    factor = inverse_factor(hessian)
    importance = factor.square().sum(0).reciprocal()  # 1 / diag(U'U)
    grouped = weight.view(groups, -1)
    start, _ = optimal_centroids(grouped, 1 << rule.bits, importance=importance)
    luts = round_to_grid(start, rule.lut_dtype)

    nearest = hard_assign(grouped, luts.values).view(rows, n)
    yield _Candidate(luts, nearest, output_error(weight - chosen(luts.values.float(), nearest), hessian))
    indices = compensated_indices(weight, luts.values.float(), factor)
    del factor
    for turn in range(ROUNDS + 1):
        if turn:
            fitted, places = refitted_centroids(weight, luts.values.float(), hessian, indices).sort(1)
            luts = round_to_grid(fitted, rule.lut_dtype)
            ranks = places.argsort(1).to(torch.uint8)  # where each entry went
            indices = ranks.gather(1, indices.view(groups, -1).long()).view(rows, n)
        indices, error = descended_indices(weight, luts.values.float(), hessian, indices)
        yield _Candidate(luts, indices, error)
