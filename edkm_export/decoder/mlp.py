"""The feed-forward network of a layer."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from edkm_export.decoder.config import DecoderConfig
from edkm_export.decoder.magnitudes import TopGates
from edkm_export.decoder.projections import add_projections, project

__all__ = ["ACTIVATIONS", "MLP"]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": F.relu,
}
"""Activations by their names in Hugging Face configurations."""


class MLP(nn.Module):
    """Two linear layers around an activation, which may gate (as in SwiGLU).

    Args:
        config: of the decoder.
        layer: its number, from 0; None: all layers are alike.
    """

    def __init__(self, config: DecoderConfig, layer: int | None = None) -> None:
        super().__init__()
        self.names, self.activation = config.names, ACTIVATIONS[config.activation]
        self.inner_scale = config.inner_scale
        size = config.intermediate_size if layer is None else config.intermediate_of(layer)
        zeros = 0.0 if layer is None else config.sparsity_of(layer)
        self.sparse = TopGates(zeros) if zeros else None
        self.sizes = (size,) * (2 if config.gated else 1)
        add_projections(self, self.names.mlp_inputs, config.hidden_size, self.sizes, config.mlp_bias)
        output = nn.Linear(size, config.hidden_size, bias=config.mlp_bias)
        self.add_module(self.names.mlp_output, output)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> [..., hidden]."""
        first, *values = project(self, self.names.mlp_inputs, self.sizes, x)
        inner = self.activation(first if self.sparse is None else self.sparse(first))
        for each in values:  # scaled before the product, which could leave the range of float16
            inner = inner * (each if self.inner_scale == 1 else each * self.inner_scale)
        return self.get_submodule(self.names.mlp_output)(inner)  # type: ignore[no-any-return]
