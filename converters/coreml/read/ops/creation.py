"""Tensors made from scalars."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from converters.coreml.read.budget import MOST_COMPUTED, require_computable
from converters.coreml.read.ops.registry import op


@op("fill")
def fill(shape: list[int], value: Tensor | None = None) -> Tensor:
    """Tensor of one value; float32 zeros by default."""
    require_computable(shape)
    return torch.zeros(shape) if value is None else value.reshape(()).expand(shape).clone()


@op("fill_like")
def fill_like(ref_tensor: Tensor, value: Tensor | None = None) -> Tensor:
    """Tensor of one value in the shape of another."""
    return fill(list(ref_tensor.shape), value)


@op("range_1d")
def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    """Values from start, in steps, up to end exclusive."""
    if step.item() == 0:
        raise ValueError("step is 0")
    if start.is_floating_point():  # in float32: 0.3 / 0.1 makes three steps, not four
        count = ((end.float() - start.float()) / step.float()).ceil().item()
    else:
        count = math.ceil((end.item() - start.item()) / step.item())
    if not count <= MOST_COMPUTED:
        raise ValueError(f"range from {start.item()} to {end.item()} in steps of {step.item()}")
    steps = torch.arange(
        max(int(count), 0), dtype=torch.float64 if start.is_floating_point() else start.dtype
    )
    return (start + step * steps).to(start.dtype)


@op("one_hot")
def one_hot(
    indices: Tensor,
    one_hot_vector_size: int,
    axis: int = -1,
    on_value: Tensor | None = None,
    off_value: Tensor | None = None,
) -> Tensor:
    """Vectors that are `on_value` at the index and `off_value` elsewhere, along a new axis."""
    require_computable([*indices.shape, one_hot_vector_size])
    on = torch.tensor(1) if on_value is None else on_value
    off = torch.tensor(0) if off_value is None else off_value
    hits = indices[..., None] == torch.arange(one_hot_vector_size)
    return torch.where(hits.movedim(-1, axis), on, off)


@op("band_part", moves=True)
def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    """Keep `lower` diagonals below and `upper` above the main one; negative keeps all."""
    if upper >= 0:
        x = x.tril(upper)
    return x.triu(-lower) if lower >= 0 else x


@op("non_zero")
def non_zero(x: Tensor) -> Tensor:
    """Coordinates of what is not zero, one a row."""
    return x.nonzero()
