"""Affine quantization of values at run time."""

from __future__ import annotations

import torch
from torch import Tensor

from converters.coreml.read.ops.registry import Call, UnsupportedForm, op

_LIMITS = {"int8": (-128, 127), "uint8": (0, 255), "int4": (-8, 7), "uint4": (0, 15)}


def _along(value: Tensor, like: Tensor, axis: int | None) -> Tensor:
    """A scalar as it is; a vector along `axis`."""
    if value.dim() == 0:
        return value
    if value.dim() != 1 or axis is None:
        raise ValueError(f"scale or zero_point {list(value.shape)} with axis {axis}")
    shape = [1] * like.dim()
    shape[axis] = -1
    return value.reshape(shape)


@op("quantize")
def quantize(
    input: Tensor,
    scale: Tensor,
    output_dtype: str,
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    """clip(round(input / scale) + zero_point), halves rounded to even."""
    if output_dtype not in _LIMITS:
        raise UnsupportedForm(f"output_dtype {output_dtype!r}")
    values = (input.float() / _along(scale.float(), input, axis)).round_()
    if zero_point is not None:
        values = values + _along(zero_point.float(), input, axis)
    return values.clamp(*_LIMITS[output_dtype])


@op("dequantize")
def dequantize(
    input: Tensor, scale: Tensor, call: Call, zero_point: Tensor | None = None, axis: int | None = None
) -> Tensor:
    """scale * (input - zero_point)."""
    values = input.to(torch.float32)
    if zero_point is not None:
        values = values - _along(zero_point.float(), input, axis)
    return (values * _along(scale.float(), input, axis)).to(call.carrier)
