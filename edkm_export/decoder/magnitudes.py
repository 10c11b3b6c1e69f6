"""Statistics of the channels of a vector that cannot overflow float16: its length, the largest of its values.

As in `norms`, a vector is first divided by its largest magnitude: every square is then at most one.
"""

from __future__ import annotations

import statistics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SameMagnitude", "TopGates"]

_FLOOR = 2.0**-8  # as in `norms`


def _narrow(x: Tensor) -> tuple[Tensor, Tensor]:
    """x with a largest magnitude of one, and what one stands for then [..., 1]."""
    largest = x.abs().amax(-1, keepdim=True) + _FLOOR
    return x / largest, largest


class SameMagnitude(nn.Module):
    """Gives a vector the root mean square of another one.

    Args:
        least: mean square below which a vector counts as one of that mean square.
    """

    root_least: Tensor

    def __init__(self, least: float) -> None:
        super().__init__()
        # a tensor, see `norms`
        self.register_buffer("root_least", torch.tensor([least**0.5], device="cpu"), persistent=False)

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        """x [..., size], like [..., size] or [..., 1, size] -> as x."""
        narrow, largest = _narrow(x)
        least = (self.root_least / largest).square()
        inverse = torch.rsqrt(torch.maximum(narrow.square().mean(-1, keepdim=True), least))
        wanted, length = _narrow(like)
        length = length * wanted.square().mean(-1, keepdim=True).sqrt()
        return narrow * (inverse * length)


class TopGates(nn.Module):
    """Leaves of a vector what lies above a quantile of the normal distribution with its mean and deviation.

    Args:
        zeros: part of the channels that becomes zero, between 0 and 1.
    """

    def __init__(self, zeros: float) -> None:
        super().__init__()
        self.deviations = statistics.NormalDist().inv_cdf(zeros)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> what is above the quantile, less the quantile; zero for the others."""
        narrow, largest = _narrow(x)
        mean = narrow.mean(-1, keepdim=True)
        deviation = (narrow - mean).square().mean(-1, keepdim=True).sqrt()
        return F.relu(narrow - (mean + deviation * self.deviations)) * largest
