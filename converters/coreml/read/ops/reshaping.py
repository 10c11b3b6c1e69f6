"""Ops that change the shape or the order of axes, and nothing else."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from converters.coreml.read.budget import require_computable
from converters.coreml.read.ops.registry import Call, op


@op("shape")
def shape_of(x: Tensor) -> Tensor:
    """Sizes of x, int32."""
    return torch.tensor(x.shape, dtype=torch.int32)


@op("reshape", moves=True)
def reshape(x: Tensor, shape: list[int], call: Call) -> Tensor:
    """Keep the values in another shape; 0 inherits a size, -1 is inferred.

    A 0 inherits the size of its axis; from iOS 17 on axes are matched from the last one, and a 0 without one is 1.
    """
    missing = x.dim() - len(shape)
    if 0 in shape and missing and call.ios < 17:
        raise ValueError(f"shape {shape} inherits axes, so it must have the rank of x, {x.dim()}")
    sizes = [
        size if size != 0 else (x.shape[axis + missing] if axis + missing >= 0 else 1)
        for axis, size in enumerate(shape)
    ]
    if x.numel() == 0 and sizes.count(-1) == 1:  # torch refuses to infer a size beside a 0
        place = sizes.index(-1)
        others = math.prod(sizes[:place] + sizes[place + 1 :])
        free = math.prod(size for size in x.shape if size)
        sizes[place] = 0 if others else max(free // math.prod(size for size in sizes if size > 0), 1)
    return x.reshape(sizes)


@op("reshape_like", moves=True)
def reshape_like(
    x: Tensor, ref_tensors: list[Tensor], begins: list[int], ends: list[int], end_masks: list[bool]
) -> Tensor:
    """Reshape to the sizes of other tensors, of each those from `begins` to `ends`, or all from `begins` on."""
    sizes: list[int] = []
    for reference, begin, end, whole in zip(ref_tensors, begins, ends, end_masks, strict=True):
        sizes += reference.shape[begin:] if whole else reference.shape[begin:end]
    return x.reshape(sizes)


@op("transpose", moves=True)
def transpose(x: Tensor, perm: list[int]) -> Tensor:
    """Permute the axes."""
    return x.permute(perm)


@op("expand_dims", moves=True)
def expand_dims(x: Tensor, axes: list[int]) -> Tensor:
    """Insert axes of size 1, counted in the result."""
    rank = x.dim() + len(axes)
    for axis in sorted(axis + rank if axis < 0 else axis for axis in axes):
        x = x.unsqueeze(axis)
    return x


@op("squeeze", moves=True)
def squeeze(x: Tensor, axes: list[int] | None = None) -> Tensor:
    """Remove axes of size 1; others in `axes` stay, in torch as in MIL."""
    return x.squeeze() if axes is None else x.squeeze(axes)


@op("flatten2d", moves=True)
def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    """Flatten the axes before `axis`, and those from it on."""
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@op("reverse", moves=True)
def reverse(x: Tensor, axes: list[int] | None = None) -> Tensor:
    """Reverse the order along `axes` (absent: all)."""
    return x.flip(list(range(x.dim())) if axes is None else axes)


@op("tile", moves=True)
def tile(x: Tensor, reps: list[int]) -> Tensor:
    """Repeat x along each axis."""
    if len(reps) != x.dim():
        raise ValueError(f"{len(reps)} repetitions for a tensor of rank {x.dim()}")
    require_computable([size * times for size, times in zip(x.shape, reps, strict=True)])
    return x.repeat(reps)


@op("pixel_shuffle", moves=True)
def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    """Move blocks of channels into space."""
    return torch.pixel_shuffle(x, upscale_factor)


@op("pixel_unshuffle", moves=True)
def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    """Move blocks of space into channels."""
    return torch.pixel_unshuffle(x, downscale_factor)
