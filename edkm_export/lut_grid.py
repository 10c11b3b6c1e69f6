"""Rounding of LUT entries: to float16, or to integer levels with one float16 scale a LUT.

Scales have at most four significant bits. The product with an int8 entry then has at most eleven, which float16
holds, so that a runtime may round it or not; with an int4 entry at most eight, which bfloat16 holds as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edkm_export.lut_dtypes import LUT_DTYPES, LutDtype

__all__ = ["LutDtype", "Rounded", "check_bits", "int8_scale", "round_to_grid", "scale_of", "suited"]

_HIGHEST = {name: each.levels[1] for name, each in LUT_DTYPES.items() if each.levels is not None}
_SMALLEST = 2.0**-24  # of float16
_LARGEST_INT4 = 7680.0  # with four significant bits; -8 times the next one is beyond float16
_CANDIDATES = 16  # scales of an int4 LUT that are tried: two octaves
_NARROW = 1 / 64  # of the largest magnitude: nearly half the distance of levels with the smallest candidate


@dataclass(frozen=True)
class Rounded:
    """LUTs on their grid.

    Attributes:
        values: what they decode to, float16 [groups, k].
        lut: as stored, float16 or int8 [groups, k].
        scale: float16 [groups] for int8 and int4, otherwise None.
    """

    values: Tensor
    lut: Tensor
    scale: Tensor | None


def check_bits(dtype: LutDtype, bits: int) -> None:
    """Refuse indices that a grid has too few levels for.

    Raises:
        ValueError: `bits` is above what `dtype` takes.
    """
    most, levels = LUT_DTYPES[dtype].max_bits, LUT_DTYPES[dtype].levels
    if bits > most and levels is not None:
        count = levels[1] - levels[0] + 1
        raise ValueError(
            f"{dtype} has {count} levels, so that with indices of {bits} bits there is nothing left to choose; use "
            f"int8, or at most {most} bits"
        )


def suited(dtype: LutDtype, bits: int) -> LutDtype:
    """The same grid, but int8 in place of int4 where indices of `bits` bits are too many for it."""
    return "int8" if bits > LUT_DTYPES[dtype].max_bits else dtype


def round_to_grid(centroids: Tensor, dtype: LutDtype) -> Rounded:
    """Round centroids, float [groups, k], to the levels of a LUT dtype."""
    if dtype == "float16":
        values = centroids.half()
        return Rounded(values, values, None)
    scale = scale_of(centroids, dtype)
    lut = _levels(centroids.double(), scale.double()[:, None], dtype).to(LUT_DTYPES[dtype].storage)
    return Rounded((lut.float() * scale.float()[:, None]).half(), lut, scale)


def scale_of(centroids: Tensor, dtype: Literal["int8", "int4"]) -> Tensor:
    """The scale of each LUT: float [groups, k] -> float16 [groups]; 1 where all centroids are zero."""
    return _int4_scale(centroids) if dtype == "int4" else int8_scale(centroids.abs().amax(1))


def int8_scale(largest: Tensor) -> Tensor:
    """Choose the scale of an int8 LUT: the first with four significant bits that reaches the largest entry.

    Args:
        largest: float, largest magnitude of the entries.

    Returns:
        float16, of the same shape: at least `largest / 127`, or 1 where that is zero.
    """
    needed = largest.double() / _HIGHEST["int8"]
    _, exponent = torch.frexp(needed)  # needed is in [2**(exponent - 1), 2**exponent)
    unit = torch.ldexp(torch.ones_like(needed), exponent - 4).clamp_min(_SMALLEST)  # of the fourth digit
    scale = ((needed / unit).ceil() * unit).clamp_max(512.0)  # 127 * 512 is the largest that float16 holds
    return torch.where(largest > 0, scale, 1.0).half()


def _levels(centroids: Tensor, scale: Tensor, dtype: Literal["int8", "int4"]) -> Tensor:
    """Levels nearest to the centroids: integers, float64."""
    levels = LUT_DTYPES[dtype].levels
    assert levels is not None
    return (centroids / scale).round_().clamp_(*levels)


def _int4_scale(centroids: Tensor) -> Tensor:
    """Choose the scale of int4 LUTs: of sixteen, the one with the least estimated squared error.

    The scale that reaches the largest entry is too coarse for the others: entries far out have few weights, and are
    better cut off. How many an entry has follows from the centroids: a quantizer of many levels has the least
    squared error with cells of width density**(-1/3) (Bennett 1948; Panter & Dite 1951), so that a cell of width g
    holds a share of the weights in proportion to g**-2. The choice needs neither weights nor indices, and follows the
    centroids while they are trained. No shape depends on data, and nothing waits for the device.

    Args:
        centroids: float [groups, k] in any order, k at least 2.

    Returns:
        float16 [groups], 1 where all centroids are zero.
    """
    ordered = centroids.double().sort(1).values
    largest = ordered.abs().amax(1, keepdim=True)
    candidates = _int4_candidates(largest / _HIGHEST["int4"])  # [groups, candidates]
    share = _cells(ordered / torch.where(largest > 0, largest, 1.0)) ** -2
    levels = _levels(ordered[:, None], candidates[..., None], "int4")
    error = ordered[:, None] - levels * candidates[..., None]  # [groups, candidates, k]
    best = (error.square_() * share[:, None]).sum(2).argmin(1, keepdim=True)
    return torch.where(largest > 0, candidates.gather(1, best), 1.0)[:, 0].half()


def _int4_candidates(needed: Tensor) -> Tensor:
    """Scales of four significant bits from the first that is at least `needed` [groups, 1] downwards, float64."""
    mantissa, exponent = torch.frexp(needed)
    # Mantissas 8 to 15 of each octave are numbered through; a first mantissa of 16 is 8 of the next octave.
    first = 8 * exponent + (mantissa * 16).ceil().to(exponent.dtype)
    number = first - torch.arange(_CANDIDATES, dtype=exponent.dtype, device=needed.device)
    octave = (number - 8).div(8, rounding_mode="floor")
    scale = torch.ldexp((number - 8 * octave).double(), octave - 4)
    # By way of float16, whose subnormal numbers are multiples of the smallest.
    return scale.clamp(_SMALLEST, _LARGEST_INT4).half().double()


def _cells(ordered: Tensor) -> Tensor:
    """Widths of the cells of ordered centroids [groups, k], in units of the largest magnitude.

    From midpoint to midpoint; the first and the last, which have no end, are as wide as the distance to their
    neighbour. In a good quantizer that is all. But where centroids meet, while they are trained or for want of
    different weights, no cell may look as if it held all the weights: an outer one counts as at least half as wide
    as the next, none as narrower than candidates can tell apart, and a centroid equal to both its neighbours, which
    share its weights, as a wide one, with few.
    """
    gaps = ordered.diff(dim=1)
    width = (torch.cat([gaps[:, :1], gaps], 1) + torch.cat([gaps, gaps[:, -1:]], 1)) / 2
    first = torch.maximum(width[:, :1], width[:, 1:2] / 2)
    last = torch.maximum(width[:, -1:], width[:, -2:-1] / 2)
    width = torch.cat([first, width[:, 1:-1], last], 1)
    return torch.where(width > 0, width.clamp_min(_NARROW), 1.0)
