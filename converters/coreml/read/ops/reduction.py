"""Reductions. `axes` absent means all axes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from converters.coreml.read.ops.registry import op


def _all(x: Tensor, axes: list[int] | None) -> list[int]:
    return list(range(x.dim())) if axes is None else axes


@op("reduce_sum")
def reduce_sum(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    """Sum."""
    return x.sum(_all(x, axes), keepdim=keep_dims)


@op("reduce_mean")
def reduce_mean(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    """Mean; of integers, truncated towards zero."""
    if not x.is_floating_point():
        return x.double().mean(_all(x, axes), keepdim=keep_dims)  # truncated to the declared integer type
    return x.mean(_all(x, axes), keepdim=keep_dims)


def _extreme(x: Tensor, axes: list[int] | None, keep_dims: bool, sign: int) -> Tensor:
    reduced = _all(x, axes)
    if any(x.shape[axis] == 0 for axis in reduced):
        kept = {axis % x.dim() for axis in reduced}
        shape = [
            1 if axis in kept else size for axis, size in enumerate(x.shape) if keep_dims or axis not in kept
        ]
        if x.is_floating_point():
            return x.new_full(shape, sign * math.inf)
        return x.new_full(shape, torch.iinfo(x.dtype).max if sign > 0 else torch.iinfo(x.dtype).min)
    return x.amin(reduced, keepdim=keep_dims) if sign > 0 else x.amax(reduced, keepdim=keep_dims)


@op("reduce_max")
def reduce_max(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    """Largest value; of no values, the smallest one of the type."""
    return _extreme(x, axes, keep_dims, -1)


@op("reduce_min")
def reduce_min(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    """Smallest value; of no values, the largest one of the type."""
    return _extreme(x, axes, keep_dims, 1)


@op("reduce_prod")
def reduce_prod(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    """Product."""
    for axis in sorted((axis % x.dim() for axis in _all(x, axes)), reverse=True):
        x = x.prod(axis, keepdim=keep_dims)
    return x


@op("reduce_sum_square")
def reduce_sum_square(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    """Sum of squares."""
    return (x * x).sum(_all(x, axes), keepdim=keep_dims)


@op("reduce_l1_norm")
def reduce_l1_norm(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    """Sum of magnitudes."""
    return x.abs().sum(_all(x, axes), keepdim=keep_dims)


@op("reduce_l2_norm")
def reduce_l2_norm(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    """Square root of the sum of squares."""
    return (x * x).sum(_all(x, axes), keepdim=keep_dims).sqrt()


@op("reduce_log_sum_exp")
def reduce_log_sum_exp(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    """Logarithm of the sum of exponentials."""
    return torch.logsumexp(x, _all(x, axes), keepdim=keep_dims)


@op("reduce_log_sum")
def reduce_log_sum(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    """Logarithm of the sum."""
    return x.sum(_all(x, axes), keepdim=keep_dims).log()


@op("reduce_argmax")
def reduce_argmax(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    """Position of the largest value; the declared type of the output tells the dtype."""
    del output_dtype
    return x.argmax(axis, keepdim=keep_dims)


@op("reduce_argmin")
def reduce_argmin(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    """Position of the smallest value; the declared type of the output tells the dtype."""
    del output_dtype
    return x.argmin(axis, keepdim=keep_dims)


@op("cumsum")
def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    """Sum up along an axis, forwards or in reverse; `exclusive` leaves out the element itself."""
    if reverse:
        x = x.flip(axis)
    total = x.cumsum(axis)
    if exclusive:
        total = total - x
    return total.flip(axis) if reverse else total
