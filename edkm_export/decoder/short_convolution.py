"""Convolutions along the text, and LFM2's block around one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from edkm_export.decoder.config import DecoderConfig
from edkm_export.decoder.context import Context
from edkm_export.decoder.states import Cache

__all__ = ["ShortConvolution", "along_text", "depthwise"]

# Three projections are multiplied with each other. Two of them are held 16 times smaller, so that each may be six times
# larger before the product leaves float16, and the output is made larger again, which changes no bit of it.
_SCALE = 2.0**-4


def depthwise(channels: int, kernel_size: int, bias: bool) -> nn.Conv1d:
    """A layer that convolves each channel with a kernel of its own."""
    return nn.Conv1d(channels, channels, kernel_size, groups=channels, bias=bias)


def along_text(layer: nn.Module, columns: Tensor, number: int, cache: Cache | None) -> Tensor:
    """Convolve a text, each token with those before it.

    Args:
        layer: from `depthwise`.
        columns: of the new tokens, [batch, channels, new].
        number: of the decoder's layer.
        cache: with the columns before them; None: these are the first.

    Returns:
        [batch, channels, new].
    """
    weight = layer.get_parameter("weight")
    channels, _, width = weight.shape
    columns = F.pad(columns, (width - 1, 0)) if cache is None else cache.extend(number, columns)[..., 1:]
    return F.conv1d(columns, weight, layer.bias, groups=channels)  # type: ignore[arg-type]


class ShortConvolution(nn.Module):
    """What LFM2 has in the place of attention in most layers: a convolution of a few tokens, gated before and after it.

    Args:
        config: of the decoder.
        layer: its number, from 0.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        size, bias = config.hidden_size, config.convolution_bias
        self.layer, self.size = layer, size
        self.in_proj = nn.Linear(size, 3 * size, bias=bias)
        self.conv = depthwise(size, config.kernel_size, bias)
        self.out_proj = nn.Linear(size, size, bias=bias)
        self.scale = 1.0 if bias else _SCALE  # a bias would have to be scaled, and could not be read back

    def forward(self, x: Tensor, context: Context, cache: Cache | None) -> Tensor:
        """x [batch, new, hidden] -> [batch, new, hidden]."""
        before, after, inner = self.in_proj(x).split([self.size] * 3, dim=-1)
        inner = before * self._scaled(inner, self.scale)
        if context.real is not None:  # after the product: a bias would put something into padding again
            inner = inner * context.real
        mixed = along_text(self.conv, inner.transpose(1, 2), self.layer, cache).transpose(1, 2)
        output = self.out_proj(self._scaled(after, self.scale) * mixed)
        return self._scaled(output, self.scale**-2)

    @staticmethod
    def _scaled(x: Tensor, factor: float) -> Tensor:
        return x if factor == 1 else x * factor
