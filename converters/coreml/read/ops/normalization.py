"""Normalizations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from converters.coreml.read.ops.registry import op


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    return value.view(-1, *[1] * (x.dim() - 2))  # axis 1 of x


@op("layer_norm")
def layer_norm(
    x: Tensor,
    axes: list[int] | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """Normalize to zero mean and unit variance over `axes` (absent: all), then scale and shift."""
    normalized = sorted(axis % x.dim() for axis in (range(x.dim()) if axes is None else axes))
    shape = [size if axis in normalized else 1 for axis, size in enumerate(x.shape)]
    variance, mean = torch.var_mean(x, normalized, correction=0, keepdim=True)
    result = (x - mean).mul_((variance + epsilon).rsqrt_())
    if gamma is not None:
        result.mul_(gamma.reshape(shape))
    if beta is not None:
        result.add_(beta.reshape(shape))
    return result


@op("batch_norm")
def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """Normalize each channel, axis 1, by a given mean and variance."""
    result = (x - _per_channel(mean, x)) * _per_channel((variance + epsilon).rsqrt(), x)
    if gamma is not None:
        result = result * _per_channel(gamma, x)
    return result if beta is None else result + _per_channel(beta, x)


@op("instance_norm")
def instance_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5
) -> Tensor:
    """Normalize each channel of each sample over its spatial axes."""
    spatial = list(range(2, x.dim()))
    variance, mean = torch.var_mean(x, spatial, correction=0, keepdim=True)
    result = (x - mean) * (variance + epsilon).rsqrt()
    if gamma is not None:
        result = result * _per_channel(gamma, x)
    return result if beta is None else result + _per_channel(beta, x)


@op("l2_norm")
def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Divide by the L2 norm over the last three axes."""
    return x * ((x * x).sum((-3, -2, -1), keepdim=True) + epsilon).rsqrt()


@op("local_response_norm")
def local_response_norm(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """Divide by (k + alpha / size * the sum of squares over `size` neighboring channels) ** beta.

    Channels are axis 1; a tensor of rank 3 is taken for [channels, h, w], as the expected values of coremltools' own
    test show that Core ML does.
    """
    axis = 0 if x.dim() == 3 else 1
    squares = (x * x).movedim(axis, -1)
    padded = F.pad(squares, (size // 2, (size - 1) // 2))
    near = padded.unfold(-1, size, 1).sum(-1).movedim(-1, axis)
    return x / (k + alpha / size * near).pow(beta)
