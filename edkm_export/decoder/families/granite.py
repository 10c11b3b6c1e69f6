"""Granite 3, and Granite 4 without experts and without Mamba layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pydantic

from edkm_export.decoder.config import DecoderConfig, Names
from edkm_export.decoder.families.settings import RotarySettings

__all__ = ["GraniteHybridSettings", "GraniteSettings"]


class _Multiplied(RotarySettings):
    attention_bias: bool = False
    embedding_multiplier: pydantic.PositiveFloat = pydantic.Field(1.0, examples=[12.0, 3])
    attention_multiplier: pydantic.PositiveFloat = pydantic.Field(1.0, examples=[0.2, 0.5])
    residual_multiplier: pydantic.PositiveFloat = pydantic.Field(1.0, examples=[0.22, 1.5])
    logits_scaling: pydantic.PositiveFloat = pydantic.Field(1.0, examples=[2.0, 0.7])

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        return replace(
            super().decoder_config(),
            embedding_scale=self.embedding_multiplier,
            attention_scale=self.attention_multiplier,
            output_scale=self.residual_multiplier,
            logit_scale=1 / self.logits_scaling,
            qkv_bias=self.attention_bias,
            output_bias=self.attention_bias,
        )


class GraniteSettings(_Multiplied):
    """Llama with four multipliers: of embeddings, of scores, of what attention and MLP add, and of logits."""

    model_type = "granite"
    models = "Granite 3"

    mlp_bias: bool = False

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        return replace(super().decoder_config(), mlp_bias=self.mlp_bias)


class GraniteHybridSettings(_Multiplied):
    """As `granite`, with a fused MLP and with or without RoPE; no experts (`num_local_experts` 0), no Mamba layers."""

    model_type = "granitemoehybrid"
    models = "Granite 4 (350M, 1B, Micro)"
    published_layer_types = {"full_attention": "attention"}

    intermediate_size: pydantic.PositiveInt = pydantic.Field(alias="shared_intermediate_size")
    num_local_experts: Literal[0] = pydantic.Field(examples=[0])
    layer_types: list[Literal["attention", "full_attention"]] = pydantic.Field(examples=[["attention"] * 2])
    position_embedding_type: Literal["rope"] | None = pydantic.Field(None, examples=["rope", None])
    mamba_n_heads: pydantic.PositiveInt = pydantic.Field(128, examples=[2])  # of layers that there are not

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        config = super().decoder_config()
        return replace(
            config,
            layer_kinds=config.layer_kinds[:1] * len(self.layer_types),
            names=Names(mlp="shared_mlp", mlp_inputs=("input_linear",), mlp_output="output_linear"),
            rotary_dim=0 if self.position_embedding_type is None else config.rotary_dim,
        )
