"""Alternating updates (AltUp, arXiv 2301.13310) and the linear path beside attention (LAuReL), as Gemma 3n has them.

A model carries several residual streams. A layer predicts all of them from each other, computes one, and corrects the
others by how far the prediction of that one was off.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from edkm_export.decoder.config import AltUp, DecoderConfig
from edkm_export.decoder.magnitudes import SameMagnitude
from edkm_export.decoder.norms import RMSNorm, build_norm

__all__ = ["AlternatingUpdates", "Laurel", "add_streams", "joined", "spread"]

_OUT, _BACK = "altup_projections", "altup_unembed_projections"
_LEAST = 1e-5  # of a mean square, as transformers has it
# What the router reads is divided by the hidden size. A part of that comes before its product and the rest after it, so
# that neither side leaves float16; right behind the norm a converter would fold it into the norm's weight.
_ROUTED = 2.0**-5


def add_streams(stack: nn.Module, config: DecoderConfig, altup: AltUp) -> None:
    """Give a stack what makes the further streams of the embedded tokens, and one of all of them again.

    Args:
        stack: which gets it.
        config: of the decoder.
        altup: of its streams.
    """
    size = config.hidden_size
    for name in (_OUT, _BACK):
        layers = (nn.Linear(size, size, bias=False) for _ in range(altup.streams - 1))
        stack.add_module(name, nn.ModuleList(layers))
    stack.add_module("same_magnitude", SameMagnitude(_LEAST * config.residual_scale**2))


def spread(stack: nn.Module, x: Tensor) -> Tensor:
    """Streams of the embedded tokens: x [batch, new, hidden] -> [batch, new, streams, hidden]."""
    same = stack.get_submodule("same_magnitude")
    others = [same(layer(x), x) for layer in stack.get_submodule(_OUT).children()]
    return torch.cat([each.unsqueeze(2) for each in (x, *others)], dim=2)


def joined(stack: nn.Module, streams: Tensor) -> Tensor:
    """Mean of the streams, brought back: [batch, new, streams, hidden] -> [batch, new, hidden]."""
    first, *others = _apart(streams)
    same = stack.get_submodule("same_magnitude")
    mixed = first
    for layer, stream in zip(stack.get_submodule(_BACK).children(), others, strict=True):
        mixed = mixed + same(layer(stream), first)
    return mixed * (1 / (1 + len(others)))


def _apart(streams: Tensor) -> list[Tensor]:
    """[batch, new, streams, hidden] -> [batch, new, hidden] of each."""
    batch, new, count, size = streams.shape
    parts: tuple[Tensor, ...] = streams.split([1] * count, dim=2)  # type: ignore[no-untyped-call]
    return [part.reshape(batch, new, size) for part in parts]


class AlternatingUpdates(nn.Module):
    """Predictions and corrections of a layer.

    Args:
        config: of the decoder.
        altup: of its streams.
    """

    def __init__(self, config: DecoderConfig, altup: AltUp) -> None:
        super().__init__()
        size, count = config.hidden_size, altup.streams
        self.count, self.active, self.scales = count, altup.active, altup.scales
        self.correct_output_scale = nn.Parameter(torch.zeros(size))
        self.correction_coefs = nn.Linear(count, count, bias=False)
        self.prediction_coefs = nn.Linear(count, count**2, bias=False)
        self.modality_router = nn.Linear(size, count, bias=False)
        eps = config.norm_eps * config.residual_scale**2
        self.router_norm = RMSNorm(size, eps, offset=config.norm_offset, scale=_ROUTED)
        self.router_scale = 1 / (size * _ROUTED)

    def predict(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        """All streams from each other: [batch, new, streams, hidden] -> the same, and the active one of them."""
        coefficients = self.prediction_coefs(self._modalities(_apart(streams)[self.active]))
        batch, new = streams.shape[:2]
        predicted = coefficients.reshape(batch, new, self.count, self.count) @ streams + streams
        return predicted, _apart(predicted)[self.active]

    def correct(self, predicted: Tensor, active: Tensor, computed: Tensor) -> tuple[Tensor, Tensor]:
        """Move all streams by how far the active one was off.

        Args:
            predicted: from `predict`.
            active: from `predict`.
            computed: what the layer made of it, [batch, new, hidden].

        Returns:
            [batch, new, streams, hidden], and the active one as it gates the per-layer embedding.
        """
        coefficients = self.correction_coefs(self._modalities(computed)) + 1.0
        corrected = coefficients.unsqueeze(-1) * (computed - active).unsqueeze(2) + predicted
        first = _apart(corrected)[self.active]
        return corrected, first * self.correct_output_scale if self.scales else first

    def add(self, streams: Tensor, added: Tensor) -> Tensor:
        """Add [batch, new, hidden] to all streams but the first."""
        first, others = streams.split([1, self.count - 1], dim=2)  # type: ignore[no-untyped-call]
        return torch.cat((first, others + added.unsqueeze(2)), dim=2)

    def _modalities(self, x: Tensor) -> Tensor:
        """[batch, new, hidden] -> [batch, new, streams], between -1 and 1."""
        return torch.tanh(self.modality_router(self.router_norm(x)) * self.router_scale)


class Laurel(nn.Module):
    """A path of low rank beside attention; its result is added to the residual stream.

    Args:
        config: of the decoder.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.scale = config.residual_scale
        self.linear_left = nn.Linear(config.hidden_size, config.laurel_rank, bias=False)
        self.linear_right = nn.Linear(config.laurel_rank, config.hidden_size, bias=False)
        self.post_laurel_norm = build_norm(config, post=True)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, new, hidden] -> the same."""
        kept = x if self.scale == 1 else x * self.scale
        return kept + self.post_laurel_norm(self.linear_right(self.linear_left(x)))  # type: ignore[no-any-return]


HALF = math.sqrt(0.5)
"""Factor on the sum of attention and the path beside it."""
