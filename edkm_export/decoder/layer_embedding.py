"""Per-layer embeddings: a table that gives each layer a vector of its own for each token (Gemma 3n, Gemma 4).

The table is larger than the model beside it, and a token needs one row of it. It is an embedding like that of the
tokens: palettized, and looked up row by row.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from edkm_export.decoder.config import DecoderConfig, LayerEmbedding
from edkm_export.decoder.mlp import ACTIVATIONS
from edkm_export.decoder.norms import RMSNorm, build_norm

__all__ = ["LayerInput", "add_tables", "layer_inputs"]

_TABLE, _PROJECTION, _NORM = (
    "embed_tokens_per_layer",
    "per_layer_model_projection",
    "per_layer_projection_norm",
)

_SHARE = math.sqrt(0.5)  # of each of the two vectors


def add_tables(stack: nn.Module, config: DecoderConfig, sizes: LayerEmbedding) -> None:
    """Give a stack the table, and what makes a second vector for each layer out of the embedded token.

    Args:
        stack: which gets them.
        config: of the decoder.
        sizes: of the table.
    """
    width = config.num_layers * sizes.size
    stack.add_module(_TABLE, nn.Embedding(sizes.rows, width))
    stack.add_module(_PROJECTION, nn.Linear(config.hidden_size, width, bias=False))
    # transformers divides the projection by the root of the hidden size, and embeds without the residual scale
    eps = config.norm_eps * config.hidden_size * config.residual_scale**2
    stack.add_module(_NORM, RMSNorm(sizes.size, eps, offset=config.norm_offset, scale=_SHARE))


def layer_inputs(
    stack: nn.Module, config: DecoderConfig, sizes: LayerEmbedding, input_ids: Tensor, embedded: Tensor
) -> tuple[Tensor, ...]:
    """What each layer reads beside the residual stream.

    Args:
        stack: with the modules of `add_tables`.
        config: of the decoder.
        sizes: of the table.
        input_ids: int [batch, new].
        embedded: what the first layer reads, [batch, new, hidden].

    Returns:
        [batch, new, size] for each layer.
    """
    layers, size = config.num_layers, sizes.size
    batch, new = embedded.shape[:2]
    if sizes.rows < config.vocab_size:  # tokens of images and sound; they read the first row
        input_ids = input_ids * (input_ids <= sizes.rows - 1).to(input_ids.dtype)
    rows = stack.get_submodule(_TABLE)(input_ids)
    projected = stack.get_submodule(_PROJECTION)(embedded).reshape(batch, new, layers, size)
    normed = stack.get_submodule(_NORM)(projected).reshape(batch, new, layers * size)
    mixed = normed + rows * (math.sqrt(size) * _SHARE)
    parts: tuple[Tensor, ...] = mixed.split([size] * layers, dim=-1)
    return parts


class LayerInput(nn.Module):
    """Base of layers with such an input: they add what they make of it, gated by the residual stream."""

    def add_input(self, config: DecoderConfig, sizes: LayerEmbedding) -> None:
        """Make the modules.

        Args:
            config: of the decoder.
            sizes: of the table.
        """
        self.input_activation = ACTIVATIONS[config.activation]
        self.stream_scale, self.input_scale = config.residual_scale, config.inner_scale
        self.per_layer_input_gate = nn.Linear(config.hidden_size, sizes.size, bias=False)
        self.per_layer_projection = nn.Linear(sizes.size, config.hidden_size, bias=False)
        self.post_per_layer_input_norm = build_norm(config, post=True, inner=config.inner_scale)

    def of_input(self, x: Tensor, given: Tensor) -> Tensor:
        """What is added: x [batch, new, hidden], given [batch, new, size] -> as x."""
        gate = self.per_layer_input_gate(x)
        if self.stream_scale != 1:  # no norm took it away
            gate = gate * (1 / self.stream_scale)
        if self.input_scale != 1:  # before the product, which could leave the range of float16
            given = given * self.input_scale
        return self.post_per_layer_input_norm(  # type: ignore[no-any-return]
            self.per_layer_projection(self.input_activation(gate) * given)
        )
