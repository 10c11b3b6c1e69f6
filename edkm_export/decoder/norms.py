"""Norms that cannot overflow float16.

A norm does not change when its input is scaled, so the input is first divided by its largest magnitude: every
square is then at most one. What is multiplied by the result is kept 64 times larger, so that channels far below
the largest one do not fall under the grid of float16.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edkm_export.decoder.config import DecoderConfig

__all__ = ["LayerNorm", "RMSNorm", "UnitNorm", "build_norm"]

# Under the largest magnitude, so that a zero input is not divided by zero. It needs no care, since any positive
# divisor gives the same result; a 64th of it is the smallest normal number of float16.
_FLOOR = 2.0**-8
_TOP = 64.0  # largest magnitude after scaling
_LEAST = 2.0**-14  # the smallest normal number of float16
_NOTHING = 2.0**-20  # beside the length of a vector whose largest channel is about one


class _Norm(nn.Module):
    """Common part.

    Args:
        size: channels.
        eps: added to the mean square of the input.
        scale: power of two, factor on the result.
    """

    root_eps: Tensor

    def __init__(self, size: int, eps: float, *, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
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
        scale: power of two, factor on the result.
    """

    def __init__(self, size: int, eps: float, *, offset: bool = False, scale: float = 1.0) -> None:
        super().__init__(size, eps, scale=scale)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> [..., size]."""
        normal = self._normalize(*self._shrink(x))
        # Not (1 + weight): a converter would fold the sum, and the weight itself could not be read back.
        return normal * self.weight + normal if self.offset else normal * self.weight


class LayerNorm(_Norm):
    """Layer norm with weight and, unless told otherwise, bias.

    Args:
        size: channels.
        eps: added to the variance of the input.
        bias: it has one.
    """

    def __init__(self, size: int, eps: float, *, bias: bool = True) -> None:
        super().__init__(size, eps)
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> [..., size]."""
        wide, largest = self._shrink(x)
        mean = (wide * (1 / _TOP)).mean(
            -1, keepdim=True
        ) * _TOP  # of numbers up to one: their sum stays small
        scaled = self._normalize(wide - mean, largest) * self.weight
        return scaled if self.bias is None else scaled + self.bias


class UnitNorm(nn.Module):
    """Divides a vector by its length; one of zeros stays as it is."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> [..., size]."""
        narrow = x / (x.abs().amax(-1, keepdim=True) + _LEAST)
        return narrow * torch.rsqrt(narrow.square().sum(-1, keepdim=True) + _NOTHING)


def build_norm(config: DecoderConfig, *, post: bool = False) -> nn.Module:
    """A norm over the hidden size.

    Args:
        config: of the decoder.
        post: a post-norm, whose output is added to the residual stream; otherwise a pre-norm, which reads it.
    """
    size, eps, residual = config.hidden_size, config.norm_eps, config.residual_scale
    if config.norm == "layer":
        assert residual == 1 and not post, "no family asks for it"
        return LayerNorm(size, eps)
    if post:
        return RMSNorm(size, eps, offset=config.norm_offset, scale=residual)
    return RMSNorm(size, eps * residual**2, offset=config.norm_offset)
