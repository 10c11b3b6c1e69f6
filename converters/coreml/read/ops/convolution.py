"""Convolution over 1 to 3 spatial axes. Tensors are [batch, channels, *spatial]."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from converters.coreml.read.budget import require_computable
from converters.coreml.read.ops.joining import last_axis_first
from converters.coreml.read.ops.registry import UnsupportedForm, op

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


def spatial_padding(
    pad_type: str,
    pad: list[int] | None,
    sizes: torch.Size,
    kernel: list[int],
    strides: list[int],
    dilations: list[int],
) -> list[int]:
    """(before, after) of each spatial axis, in MIL's order.

    Args:
        pad_type: `valid`, `custom`, `same` or `same_lower`.
        pad: of `custom`.
        sizes: of the spatial axes.
        kernel: width of each axis.
        strides: of each axis.
        dilations: of each axis.

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
    padding = spatial_padding(pad_type, pad, x.shape[2:], list(weight.shape[2:]), strides, dilations)
    if any(padding):
        pairs = zip(x.shape[2:], padding[0::2], padding[1::2], strict=True)
        require_computable([*x.shape[:2], *(max(0, sum(each)) for each in pairs)])
        x = F.pad(x, last_axis_first(padding))
    if x.dtype == torch.float32 and _is_one_product(x, weight, groups, dilations):
        # One output of each channel, as in a decode step of a short convolution: a sixth of the time, and less.
        sums = (x * weight[:, 0]).sum(tuple(range(2, x.dim())), keepdim=True)
        return sums if bias is None else sums + bias.reshape(-1, *[1] * rank)
    return _CONV[rank](x, weight, bias, strides, 0, dilations, groups)


def _is_one_product(x: Tensor, weight: Tensor, groups: int, dilations: list[int]) -> bool:
    """Each channel has a kernel of its own, which is as large as what it is laid on."""
    return (
        max(dilations) == 1 and x.shape[1] == groups == len(weight) and weight.shape[1:] == (1, *x.shape[2:])
    )


@op("conv_transpose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: list[int] | None = None,
    output_shape: list[int] | None = None,
    pad_type: str = "valid",
    strides: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """Transposed convolution with a weight [in, out / groups, *kernel].

    The whole result is cut, or filled up with what the bias alone gives, to the size that the padding or
    `output_shape` asks for.
    """
    rank = x.dim() - 2
    if rank not in _CONV_TRANSPOSE:
        raise UnsupportedForm(f"{rank} spatial axes")
    strides = strides or [1] * rank
    require_computable(
        [len(x), weight.shape[1] * groups, *map(math.prod, zip(x.shape[2:], strides, strict=False))]
    )
    whole = _CONV_TRANSPOSE[rank](x, weight, None, strides, 0, 0, groups, dilations or [1] * rank)
    sizes = whole.shape[2:]
    kind = pad_type.lower()
    before, after = [0] * rank, [0] * rank
    if kind == "custom":
        given = pad or [0] * (2 * rank)
        if len(given) != 2 * rank or min(given) < 0:
            raise ValueError(f"pad {given} for {rank} spatial axes")
        before, after = given[0::2], given[1::2]
    elif kind not in ("valid", "same", "same_lower"):
        raise UnsupportedForm(f"pad_type {pad_type!r}")
    wanted = [size - first - last for size, first, last in zip(sizes, before, after, strict=True)]
    if output_shape is not None:
        wanted = output_shape[-rank:]
    elif kind.startswith("same"):
        wanted = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    if kind.startswith("same"):
        surplus = [max(size - target, 0) for size, target in zip(sizes, wanted, strict=True)]
        before = [total // 2 if kind == "same" else total - total // 2 for total in surplus]
    require_computable([*whole.shape[:2], *wanted])
    for axis, (first, target) in enumerate(zip(before, wanted, strict=True), start=2):
        kept = whole.narrow(axis, first, min(target, whole.shape[axis] - first))
        whole = F.pad(kept, [0, 0] * (rank + 1 - axis) + [0, target - kept.shape[axis]])
    return whole if bias is None else whole + bias.reshape(-1, *[1] * rank)
