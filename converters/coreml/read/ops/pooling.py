"""Pooling over 1 to 3 spatial axes. Tensors are [batch, channels, *spatial]."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from converters.coreml.read.budget import require_computable
from converters.coreml.read.ops.convolution import spatial_padding
from converters.coreml.read.ops.joining import last_axis_first
from converters.coreml.read.ops.registry import UnsupportedForm, op

_MAX_POOL: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _windows(
    x: Tensor,
    kernel: list[int],
    pad_type: str,
    strides: list[int] | None,
    pad: list[int] | None,
    ceil_mode: bool,
) -> tuple[list[int], list[int], list[int]]:
    """Strides, padding, and what `ceil_mode` adds to it at the end of each axis.

    With `ceil_mode` a last window may reach beyond the padding, if it starts within input or padding before it.
    """
    rank = len(kernel)
    if rank not in _MAX_POOL or x.dim() != rank + 2:
        raise UnsupportedForm(f"{rank} spatial axes of {list(x.shape)}")
    strides = strides or [1] * rank
    padding = spatial_padding(pad_type, pad, x.shape[2:], kernel, strides, [1] * rank)
    extra = [0] * rank
    if ceil_mode:
        for axis, (size, width, stride) in enumerate(zip(x.shape[2:], kernel, strides, strict=True)):
            before, after = padding[2 * axis : 2 * axis + 2]
            rest = (size + before + after - width) % stride
            start = size + before + after - width - rest + stride  # of one more window
            if rest and start < size + before:
                extra[axis] = stride - rest
    return strides, padding, extra


def _padded(x: Tensor, padding: list[int], extra: list[int], value: float) -> Tensor:
    wider = [size + (extra[place // 2] if place % 2 else 0) for place, size in enumerate(padding)]
    if not any(wider):
        return x
    pairs = zip(x.shape[2:], wider[0::2], wider[1::2], strict=True)
    require_computable([*x.shape[:2], *(max(0, sum(each)) for each in pairs)])
    return F.pad(x, last_axis_first(wider), value=value)


def _wide(x: Tensor) -> Tensor:
    """torch has no mean of float16 over windows of three axes."""
    return x.float() if x.dtype == torch.float16 else x


@op("max_pool")
def max_pool(
    x: Tensor,
    kernel_sizes: list[int],
    pad_type: str,
    strides: list[int] | None = None,
    pad: list[int] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """Largest value of each window."""
    strides, padding, extra = _windows(x, kernel_sizes, pad_type, strides, pad, ceil_mode)
    return _MAX_POOL[len(kernel_sizes)](_padded(x, padding, extra, -math.inf), kernel_sizes, strides)


@op("avg_pool")
def avg_pool(
    x: Tensor,
    kernel_sizes: list[int],
    pad_type: str,
    strides: list[int] | None = None,
    pad: list[int] | None = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    """Mean of each window; padding counts as zeros unless it is excluded, what lies beyond it never counts."""
    strides, padding, extra = _windows(x, kernel_sizes, pad_type, strides, pad, ceil_mode)
    x = _wide(x)
    pool = _AVG_POOL[len(kernel_sizes)]
    mean = pool(_padded(x, padding, extra, 0.0), kernel_sizes, strides)
    if not any(extra) and not (exclude_padding_from_average and any(padding)):
        return mean
    ones = torch.ones_like(x[:1, :1])
    if not exclude_padding_from_average:
        ones = F.pad(ones, last_axis_first(padding), value=1.0)
        padding = [0] * len(padding)
    return mean / pool(_padded(ones, padding, extra, 0.0), kernel_sizes, strides)


@op("l2_pool")
def l2_pool(
    x: Tensor,
    kernel_sizes: list[int],
    pad_type: str,
    strides: list[int] | None = None,
    pad: list[int] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """Square root of the sum of squares of each window."""
    strides, padding, extra = _windows(x, kernel_sizes, pad_type, strides, pad, ceil_mode)
    x = _wide(x)
    mean = _AVG_POOL[len(kernel_sizes)](_padded(x * x, padding, extra, 0.0), kernel_sizes, strides)
    return (mean * math.prod(kernel_sizes)).sqrt()
