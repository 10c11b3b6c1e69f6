"""LFM2 and LFM2.5 of Liquid AI, without experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pydantic

from edkm_export.decoder.config import CONVOLUTION, FULL, DecoderConfig, Names
from edkm_export.decoder.families.settings import RotarySettings

__all__ = ["Lfm2Settings"]

_KINDS = {"conv": CONVOLUTION, "full_attention": FULL}
_NAMES = Names(
    final_norm="embedding_norm",
    attention_norm="operator_norm",
    attention_output="out_proj",
    query_norm="q_layernorm",
    key_norm="k_layernorm",
    mlp="feed_forward",
    mlp_norm="ffn_norm",
    mlp_inputs=("w1", "w3"),
    mlp_output="w2",
)


class Lfm2Settings(RotarySettings):
    """Gated short convolutions in most layers, attention with RMSNorm of queries and keys in the others."""

    model_type = "lfm2"
    models = "LFM2, LFM2.5"

    num_key_value_heads: pydantic.PositiveInt | None = 8
    max_position_embeddings: pydantic.PositiveInt = 128_000
    rms_norm_eps: pydantic.PositiveFloat = pydantic.Field(1e-5, alias="norm_eps")
    hidden_act: Literal["silu"] = "silu"
    tie_word_embeddings: bool = True
    # transformers' own padded batches differ from its single texts where there are biases
    conv_bias: bool = pydantic.Field(False, examples=[False])
    conv_L_cache: pydantic.PositiveInt = pydantic.Field(3, examples=[3, 4])
    block_multiple_of: pydantic.PositiveInt = pydantic.Field(256, examples=[16, 20])
    block_ffn_dim_multiplier: pydantic.PositiveFloat | None = pydantic.Field(1.0, examples=[1.0, 1.3])
    block_auto_adjust_ff_dim: bool = True
    full_attn_idxs: list[int] | None = None
    layer_types: list[Literal["conv", "full_attention"]] | None = pydantic.Field(
        None, examples=[["conv", "full_attention"], ["full_attention", "conv"]]
    )

    def layer_kinds(self) -> list[str]:
        """As `layer_types` says, or by the numbers of the layers that attend."""
        if self.layer_types is not None:
            return [_KINDS[each] for each in self.layer_types]
        layers = range(self.num_hidden_layers)
        attend = layers if self.full_attn_idxs is None else self.full_attn_idxs
        return [FULL if layer in attend else CONVOLUTION for layer in layers]

    def inner_size(self) -> int:
        """Of the MLP: two thirds of what is given, made larger to a multiple."""
        if not self.block_auto_adjust_ff_dim:
            return self.intermediate_size
        size = int(2 * self.intermediate_size / 3)
        if self.block_ffn_dim_multiplier is None:
            return size
        size, multiple = int(self.block_ffn_dim_multiplier * size), self.block_multiple_of
        return -(-size // multiple) * multiple

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        return replace(
            super().decoder_config(),
            intermediate_size=self.inner_size(),
            layer_kinds=tuple(self.layer_kinds()),
            kernel_size=self.conv_L_cache,
            convolution_bias=self.conv_bias,
            query_key_norm="head",
            names=_NAMES,
        )
