"""BERT (MiniLM, E5, BGE): learned positions and token types, norms behind attention and MLP."""

from __future__ import annotations

from typing import Literal

import pydantic
import torch.nn.functional as F
from torch import Tensor, nn

from edkm_export.decoder.config import FULL, DecoderConfig, Names
from edkm_export.decoder.context import Context
from edkm_export.decoder.families.settings import Activation, Settings
from edkm_export.decoder.mlp import ACTIVATIONS
from edkm_export.decoder.norms import LayerNorm
from edkm_export.decoder.projections import linears

__all__ = ["Bert", "BertSettings"]


class BertSettings(Settings):
    """Keys of transformers' BertConfig."""

    model_type = "bert"
    models = "all-MiniLM, E5, BGE, GTE"

    vocab_size: pydantic.PositiveInt = 30522
    hidden_size: pydantic.PositiveInt = 768
    num_hidden_layers: pydantic.PositiveInt = 12
    num_attention_heads: pydantic.PositiveInt = 12
    intermediate_size: pydantic.PositiveInt = 3072
    hidden_act: Activation = "gelu"
    max_position_embeddings: pydantic.PositiveInt = 512
    type_vocab_size: pydantic.PositiveInt = 2
    layer_norm_eps: pydantic.PositiveFloat = 1e-12
    is_decoder: Literal[False] = False
    add_cross_attention: Literal[False] = False
    position_embedding_type: Literal["absolute"] = "absolute"

    def decoder_config(self) -> DecoderConfig:
        """Sizes and options; `head_dim` need not divide the hidden size, which `Bert` checks."""
        return DecoderConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_attention_heads,
            head_dim=self.hidden_size // self.num_attention_heads,
            max_positions=self.max_position_embeddings,
            norm_eps=self.layer_norm_eps,
            layer_kinds=(FULL,) * self.num_hidden_layers,
            norm="layer",
            activation=self.hidden_act,
            gated=False,
            qkv_bias=True,
            output_bias=True,
            mlp_bias=True,
            bidirectional=True,
            token_types=self.type_vocab_size,
            names=Names(positions="position_embeddings"),
        )

    def body(self) -> Bert:
        """The model on token ids."""
        return Bert(self.decoder_config())


class Bert(nn.Module):
    """Token vectors of BERT.

    Args:
        config: sizes and options.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(config.vocab_size, hidden),
                "position_embeddings": nn.Embedding(config.max_positions, hidden),
                "token_type_embeddings": nn.Embedding(config.token_types, hidden),
                "LayerNorm": LayerNorm(hidden, config.norm_eps),
            }
        )
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(_Layer(config) for _ in config.layer_kinds)})

    def forward(self, input_ids: Tensor, context: Context, cache: None = None) -> Tensor:
        """input_ids [batch, tokens] -> [batch, tokens, hidden]."""
        tables = self.embeddings
        types = context.token_types
        assert types is not None
        x = tables["word_embeddings"](input_ids) + tables["token_type_embeddings"](types)
        x = tables["LayerNorm"](x + tables["position_embeddings"](context.position_ids))
        for layer in self.encoder["layer"].children():
            x = layer(x, context.masks[FULL])
        return x  # type: ignore[no-any-return]


class _Layer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, inner, eps = config.hidden_size, config.intermediate_size, config.norm_eps
        self.heads, self.head_dim = config.num_heads, config.head_dim
        self.activation = ACTIVATIONS[config.activation]
        projections = {name: nn.Linear(hidden, hidden) for name in ("query", "key", "value")}
        self.attention = nn.ModuleDict(
            {"self": nn.ModuleDict(projections), "output": _output(hidden, hidden, eps)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(hidden, inner)})
        self.output = _output(inner, hidden, eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [batch, tokens, hidden], mask [batch, 1, tokens, tokens] -> as x."""
        projections = self.attention["self"]
        parts = linears(x, [projections[name] for name in ("query", "key", "value")])  # type: ignore[index]
        queries, keys, values = (self._split(part) for part in parts)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        mixed = mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], self.heads * self.head_dim)
        x = _through(self.attention["output"], mixed, x)
        return _through(self.output, self.activation(self.intermediate["dense"](x)), x)

    def _split(self, x: Tensor) -> Tensor:
        """[batch, tokens, hidden] -> [batch, heads, tokens, head_dim]."""
        return x.reshape(x.shape[0], x.shape[1], self.heads, self.head_dim).transpose(1, 2)


def _output(inputs: int, hidden: int, eps: float) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(inputs, hidden), "LayerNorm": LayerNorm(hidden, eps)})


def _through(output: nn.Module, inner: Tensor, x: Tensor) -> Tensor:
    """The projection of `inner` added to x, and its norm."""
    summed = output["dense"](inner) + x  # type: ignore[index]
    return output["LayerNorm"](summed)  # type: ignore[index, no-any-return]
