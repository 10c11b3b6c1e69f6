"""Convolution and pooling over 1 to 3 spatial axes. Tensors are [batch, channels, *spatial]."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from converters.coreml.read.ops.joining import last_axis_first
from converters.coreml.read.ops.registry import UnsupportedForm, op

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_MAX_POOL: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _padding(
    pad_type: str,
    pad: list[int] | None,
    sizes: torch.Size,
    kernel: list[int],
    strides: list[int],
    dilations: list[int],
) -> list[int]:
    """(before, after) of each spatial axis, in MIL's order.

    `same` makes ceil(size / stride) outputs and pads an odd element at the end, `same_lower` before.
    """
    kind = pad_type.lower()
    if kind == "valid":
        return [0] * (2 * len(kernel))
    if kind == "custom":
        given = pad or [0] * (2 * len(kernel))
        if len(given) != 2 * len(kernel) or min(given) < 0:
            raise ValueError(f"pad {given} for {len(kernel)} spatial axes")
        return given
    if kind not in ("same", "same_lower"):
        raise UnsupportedForm(f"pad_type {pad_type!r}")
    result = []
    for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        reach = (width - 1) * dilation + 1
        total = max(0, (math.ceil(size / stride) - 1) * stride + reach - size)
        small, large = total // 2, total - total // 2
        result += [small, large] if kind == "same" else [large, small]
    return result


@op("conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """Convolution with a weight [out, in / groups, *kernel]."""
    rank = x.dim() - 2
    if rank not in _CONV:
        raise UnsupportedForm(f"{rank} spatial axes")
    strides = strides or [1] * rank
    dilations = dilations or [1] * rank
    padding = _padding(pad_type, pad, x.shape[2:], list(weight.shape[2:]), strides, dilations)
    if any(padding):
        x = F.pad(x, last_axis_first(padding))
    return _CONV[rank](x, weight, bias, strides, 0, dilations, groups)


def _symmetric(padding: list[int], kernel: list[int]) -> list[int] | None:
    """Find the padding for torch's pools, if they can take it: even, at most half the kernel."""
    before, after = padding[0::2], padding[1::2]
    fits = all(size <= width // 2 for size, width in zip(before, kernel, strict=True))
    return before if before == after and fits else None


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
    rank = len(kernel_sizes)
    strides = strides or [1] * rank
    padding = _padding(pad_type, pad, x.shape[2:], kernel_sizes, strides, [1] * rank)
    even = _symmetric(padding, kernel_sizes)
    if even is not None:
        return _MAX_POOL[rank](x, kernel_sizes, strides, even, ceil_mode=ceil_mode)
    if ceil_mode:
        raise UnsupportedForm(f"ceil_mode with pad {padding}")
    return _MAX_POOL[rank](F.pad(x, last_axis_first(padding), value=-math.inf), kernel_sizes, strides)


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
    """Mean of each window; padding counts as zeros unless it is excluded."""
    rank = len(kernel_sizes)
    strides = strides or [1] * rank
    padding = _padding(pad_type, pad, x.shape[2:], kernel_sizes, strides, [1] * rank)
    even = _symmetric(padding, kernel_sizes)
    pool = _AVG_POOL[rank]
    if even is not None:
        return pool(x, kernel_sizes, strides, even, ceil_mode, not exclude_padding_from_average)
    if ceil_mode:
        raise UnsupportedForm(f"ceil_mode with pad {padding}")
    around = last_axis_first(padding)
    mean = pool(F.pad(x, around), kernel_sizes, strides)
    if not exclude_padding_from_average:
        return mean
    covered = pool(F.pad(torch.ones_like(x[:1, :1]), around), kernel_sizes, strides)
    return mean / covered
