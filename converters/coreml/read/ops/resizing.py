"""Resizing of the last axes.

A sampling mode says which point of the input each element of the output is taken at; see `resize_bilinear` in the
documentation of coremltools.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from converters.coreml.read.budget import require_computable
from converters.coreml.read.ops.registry import UnsupportedForm, op

__all__ = ["grid_points"]

_MAX_SIZE = 1 << 24  # of one axis; a program that asks for more is taken for an attack


def grid_points(mode: str, size: Tensor, count: int) -> Tensor:
    """Points of the input, float64 [*, count], in units of its elements.

    Args:
        mode: sampling mode.
        size: length of the input, any shape [*].
        count: length of the output.
    """
    if not 0 <= count <= _MAX_SIZE:
        raise ValueError(f"size {count}")
    size = size.double()[..., None]
    step = torch.arange(count, dtype=torch.float64)
    last = size - 1
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if count == 1:
            return last / 2 if mode == "ALIGN_CORNERS" else torch.zeros_like(last)
        return step * (last / (count - 1))
    if mode == "DEFAULT":
        points = step * (size / count)
    elif mode == "OFFSET_CORNERS":
        points = (step + 0.5) * (last.clamp(min=1) / count)
    elif mode == "UNALIGN_CORNERS":
        points = (step + 0.5) * (size / count) - 0.5
    else:
        raise UnsupportedForm(f"sampling_mode {mode!r}")
    return torch.minimum(points.clamp(min=0), last)


def _linear(x: Tensor, axis: int, points: Tensor) -> Tensor:
    """Values between the elements of one axis."""
    size = x.shape[axis]
    if size == 0:
        raise ValueError("an axis of length 0")
    low = points.floor().long().clamp(0, size - 1)
    high = (low + 1).clamp(max=size - 1)
    shape = [1] * x.dim()
    shape[axis] = -1
    weight = (points - low).to(x.dtype).reshape(shape)
    require_computable([*x.shape[:axis], len(low), *x.shape[axis + 1 :]])
    return x.index_select(axis, low) * (1 - weight) + x.index_select(axis, high) * weight


def _length(size: int) -> Tensor:
    return torch.tensor(size)


def _bilinear(x: Tensor, sizes: tuple[int, int], mode: str) -> Tensor:
    for axis, count in ((-2, sizes[0]), (-1, sizes[1])):
        x = _linear(x, x.dim() + axis, grid_points(mode, _length(x.shape[axis]), count))
    return x


def _nearest(x: Tensor, axis: int, count: int, mode: str) -> Tensor:
    """The element in whose middle a point lies; in DEFAULT mode points are the centers of the output's elements."""
    size = x.shape[axis]
    points = grid_points("UNALIGN_CORNERS" if mode == "DEFAULT" else mode, _length(size), count)
    return x.index_select(axis, (points + 0.5).floor().long().clamp(0, size - 1))


def _scaled(x: Tensor, height: float, width: float) -> tuple[int, int]:
    return math.floor(x.shape[-2] * height), math.floor(x.shape[-1] * width)


@op("upsample_bilinear")
def upsample_bilinear(
    x: Tensor,
    scale_factor_height: float = 1,
    scale_factor_width: float = 1,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    """Resize by factors; the sizes are rounded down, and decide on the points."""
    sizes = _scaled(x, scale_factor_height, scale_factor_width)
    half = not align_corners if half_pixel_centers is None else half_pixel_centers
    apart = "UNALIGN_CORNERS" if half else "DEFAULT"
    return _bilinear(x, sizes, "STRICT_ALIGN_CORNERS" if align_corners else apart)


@op("upsample_nearest_neighbor")
def upsample_nearest_neighbor(
    x: Tensor, scale_factor_height: float = 1, scale_factor_width: float = 1
) -> Tensor:
    """Resize by factors; element i comes from i * size / new size, rounded down."""
    for axis, count in zip((-2, -1), _scaled(x, scale_factor_height, scale_factor_width), strict=True):
        points = grid_points("DEFAULT", _length(x.shape[axis]), count)
        x = x.index_select(axis, points.floor().long())
    return x


@op("resize_bilinear")
def resize_bilinear(
    x: Tensor, target_size_height: int = 1, target_size_width: int = 1, sampling_mode: str = "DEFAULT"
) -> Tensor:
    """Resize the last two axes."""
    return _bilinear(x, (target_size_height, target_size_width), sampling_mode)


@op("resize_nearest_neighbor")
def resize_nearest_neighbor(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    """Resize the last two axes without new values."""
    return _nearest(
        _nearest(x, x.dim() - 2, target_size_height, "DEFAULT"), x.dim() - 1, target_size_width, "DEFAULT"
    )


@op("resize")
def resize(
    x: Tensor,
    shape: list[int],
    resized_dims: int,
    interpolation_mode: str = "LINEAR",
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    """Resize the last `resized_dims` axes to the last entries of `shape`; 0 keeps the size."""
    if not 0 <= resized_dims <= len(shape) <= x.dim():
        raise ValueError(f"shape {shape} and resized_dims {resized_dims} for a tensor of rank {x.dim()}")
    if interpolation_mode not in ("LINEAR", "NEAREST_NEIGHBOR"):
        raise UnsupportedForm(f"interpolation_mode {interpolation_mode!r}")
    kept, result = x.dtype, x if x.is_floating_point() else x.double()
    for offset in range(1, resized_dims + 1):
        axis, count = x.dim() - offset, shape[-offset] or x.shape[-offset]
        if interpolation_mode == "LINEAR":
            result = _linear(result, axis, grid_points(sampling_mode, _length(x.shape[axis]), count))
        else:
            result = _nearest(result, axis, count, sampling_mode)
    return result.clone() if result is x else result.to(kept)
