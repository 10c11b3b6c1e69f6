"""Joining, splitting and padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from converters.coreml.read.budget import require_computable
from converters.coreml.read.ops.registry import UnsupportedForm, op


@op("concat", moves=True)
def concat(values: list[Tensor], axis: int, interleave: bool = False) -> Tensor:
    """Concatenate along `axis`; scalars count as vectors of one; `interleave` alternates between values."""
    values = [value.reshape(1) if value.dim() == 0 else value for value in values]
    if not interleave:
        return torch.cat(values, axis)
    axis %= values[0].dim()
    return torch.stack(values, axis + 1).flatten(axis, axis + 1)


@op("stack", moves=True)
def stack(values: list[Tensor], axis: int) -> Tensor:
    """Join along a new axis."""
    return torch.stack(values, axis)


@op("split", moves=True)
def split(
    x: Tensor, axis: int, num_splits: int | None = None, split_sizes: list[int] | None = None
) -> tuple[Tensor, ...]:
    """Cut along `axis`, evenly or into the given sizes."""
    if split_sizes is not None:
        return torch.split(x, split_sizes, axis)
    if num_splits is None or num_splits < 1 or x.shape[axis] % num_splits:
        raise ValueError(f"{num_splits} splits of an axis of size {x.shape[axis]}")
    return torch.split(x, max(x.shape[axis] // num_splits, 1), axis)


@op("pad", moves=True)
def pad(x: Tensor, pad: list[int], mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    """Pad the last axes, (before, after) of each; with a constant, mirrored, or with the border value."""
    if len(pad) % 2 or len(pad) > 2 * x.dim() or min(pad, default=0) < 0:
        raise ValueError(f"pad {pad} for a tensor of rank {x.dim()}")
    require_computable(_padded(list(x.shape), pad))
    if mode == "constant":
        return F.pad(x, last_axis_first(pad), value=constant_val)
    if mode not in ("reflect", "replicate"):
        raise UnsupportedForm(f"mode {mode!r}")
    first = x.dim() - len(pad) // 2
    for axis in range(first, x.dim()):
        before, after = pad[2 * (axis - first) : 2 * (axis - first) + 2]
        x = x.index_select(axis, _mirror(x.shape[axis], before, after, mode))
    return x


def _padded(sizes: list[int], pad: list[int]) -> list[int]:
    """Sizes after padding the last axes."""
    first = len(sizes) - len(pad) // 2
    return sizes[:first] + [
        size + before + after for size, before, after in zip(sizes[first:], pad[0::2], pad[1::2], strict=True)
    ]


def _mirror(size: int, before: int, after: int, mode: str) -> Tensor:
    """Positions that the padded axis reads: clamped, or mirrored without repeating the border."""
    if mode == "reflect" and max(before, after) >= size:
        raise ValueError(f"reflect padding of {max(before, after)} on an axis of size {size}")
    position = torch.arange(-before, size + after)
    if mode == "replicate":
        return position.clamp(0, size - 1)
    return (size - 1) - ((size - 1) - position.abs()).abs()


def last_axis_first(pad: list[int]) -> list[int]:
    """MIL lists (before, after) from the first axis to the last, torch from the last to the first."""
    pairs = [pad[start : start + 2] for start in range(0, len(pad), 2)]
    return [size for pair in reversed(pairs) for size in pair]
