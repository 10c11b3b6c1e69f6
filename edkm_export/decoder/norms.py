"""Norms that cannot overflow float16.

A norm does not change when its input is scaled, so the input is first divided by its largest magnitude: every
square is then at most one. What is multiplied by the result is kept 64 times larger, so that channels far below
the largest one do not fall under the grid of float16.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edkm_export.decoder.config import DecoderConfig

__all__ = [
    "HeadNorms",
    "LayerNorm",
    "PlainRMSNorm",
    "RMSNorm",
    "UnitNorm",
    "build_norm",
    "build_query_key_norm",
]

# Under the largest magnitude, so that a zero input is not divided by zero. It needs no care, since any positive
# divisor gives the same result; a 64th of it is the smallest normal number of float16.
_FLOOR = 2.0**-8
_TOP = 64.0  # largest magnitude after scaling
_LEAST = 2.0**-14  # the smallest normal number of float16
_NOTHING = 2.0**-20  # beside the length of a vector whose largest channel is about one


class _Norm(nn.Module):
    """Common part.

    Args:
        eps: added to the mean square of the input.
        scale: factor on the result.
    """

    root_eps: Tensor

    def __init__(self, eps: float, *, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        # A tensor, since a number divided by a tensor is converted to `inverse`, which adds an epsilon of its own.
        self.register_buffer("root_eps", torch.tensor([eps**0.5], device="cpu"), persistent=False)

    @staticmethod
    def _shrink(x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x with a largest magnitude of at most 64, and what one stands for then [..., 1]."""
        largest = x.abs().amax(-1, keepdim=True) + _FLOOR
        return x / (largest * (1 / _TOP)), largest

    def _normalize(self, wide: Tensor, largest: Tensor) -> Tensor:
        """Divide by the root mean square, epsilon included."""
        narrow = wide * (1 / _TOP)
        eps = (self.root_eps / largest).square()
        inverse = torch.rsqrt(narrow.square().mean(-1, keepdim=True) + eps)
        return wide * (inverse * (self.scale / _TOP))


class RMSNorm(_Norm):
    """Root mean square norm.

    Args:
        size: channels.
        eps: added to the mean square of the input.
        offset: multiply by one plus the weight.
        scale: factor on the result.
    """

    def __init__(self, size: int, eps: float, *, offset: bool = False, scale: float = 1.0) -> None:
        super().__init__(eps, scale=scale)
        self.weight = nn.Parameter(torch.ones(size))
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> [..., size]."""
        normal = self._normalize(*self._shrink(x))
        # Not (1 + weight): a converter would fold the sum, and the weight itself could not be read back.
        return normal * self.weight + normal if self.offset else normal * self.weight


class PlainRMSNorm(_Norm):
    """Root mean square norm without a weight.

    Args:
        eps: added to the mean square of the input.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> [..., size]."""
        return self._normalize(*self._shrink(x))


class LayerNorm(_Norm):
    """Layer norm with weight, and with or without bias.

    Args:
        size: channels.
        eps: added to the variance of the input.
        bias: add one.
    """

    def __init__(self, size: int, eps: float, *, bias: bool = True) -> None:
        super().__init__(eps)
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> [..., size]."""
        wide, largest = self._shrink(x)
        mean = (wide * (1 / _TOP)).mean(
            -1, keepdim=True
        ) * _TOP  # of numbers up to one: their sum stays small
        normal = self._normalize(wide - mean, largest) * self.weight
        return normal if self.bias is None else normal + self.bias


class UnitNorm(nn.Module):
    """Divides a vector by its length; one of zeros stays as it is."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> [..., size]."""
        narrow = x / (x.abs().amax(-1, keepdim=True) + _LEAST)
        return narrow * torch.rsqrt(narrow.square().sum(-1, keepdim=True) + _NOTHING)


class HeadNorms(nn.Module):
    """A layer norm of its own, without bias, for each of the heads that lie side by side.

    Args:
        heads: number of them.
        size: channels of each.
        eps: added to the variance of a head.
    """

    def __init__(self, heads: int, size: int, eps: float) -> None:
        super().__init__()
        self.size = size
        self.norms = nn.ModuleList(LayerNorm(size, eps, bias=False) for _ in range(heads))

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, new, heads * size] -> the same."""
        parts: tuple[Tensor, ...] = x.split([self.size] * len(self.norms), dim=-1)  # type: ignore[no-untyped-call]
        return torch.cat([norm(part) for norm, part in zip(self.norms, parts, strict=True)], dim=-1)


def build_norm(config: DecoderConfig, *, post: bool = False, inner: float = 1.0) -> nn.Module:
    """A norm over the hidden size.

    Args:
        config: of the decoder.
        post: a post-norm, whose output is added to the residual stream; otherwise a pre-norm, which reads it.
        inner: power of two by which the input of a post-norm is held smaller.
    """
    size, eps, residual = config.hidden_size, config.norm_eps, config.residual_scale
    if config.norm == "layer":
        assert residual == 1 and not post, "no family asks for it"
        return LayerNorm(size, eps, bias=config.norm_bias)
    if post:
        return RMSNorm(size, eps * inner**2, offset=config.norm_offset, scale=residual)
    return RMSNorm(size, eps * residual**2, offset=config.norm_offset)


def build_query_key_norm(config: DecoderConfig, heads: int, size: int) -> nn.Module:
    """The norm of queries or keys that `config.query_key_norm` names.

    Args:
        config: of the decoder.
        heads: of the queries, or of the keys.
        size: channels of a head.
    """
    eps = config.norm_eps
    if config.query_key_norm == "apart":
        return HeadNorms(heads, size, eps)
    return RMSNorm(size * (heads if config.query_key_norm == "whole" else 1), eps, offset=config.norm_offset)
