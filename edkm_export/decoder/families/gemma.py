"""Gemma 2 and the text models of Gemma 3."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pydantic

from edkm_export.decoder.config import DecoderConfig, Names
from edkm_export.decoder.families.settings import Activation, LayerTypeSettings

__all__ = ["GEMMA_NAMES", "Gemma2Settings", "Gemma3Settings"]

GEMMA_NAMES = Names(
    attention_output_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
)
# Residual streams of trained Gemmas pass 65,504, the end of float16. Held 64 times smaller they have room up to
# 4.2 million, and a channel is exact to 11 bits from 0.004 on.
_RESIDUAL_SCALE = 2.0**-6


class Gemma2Settings(LayerTypeSettings):
    """Norms before and after attention and MLP (pre-norm and post-norm) that multiply by one plus their weight; soft
    caps on scores and logits; scaled embedding; `query_pre_attn_scalar`; every other layer slides.
    """

    model_type = "gemma2"
    models = "Gemma 2"

    head_dim: pydantic.PositiveInt = 256
    max_position_embeddings: pydantic.PositiveInt = 8192
    hidden_act: Activation = pydantic.Field("gelu_pytorch_tanh", alias="hidden_activation")
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    query_pre_attn_scalar: pydantic.PositiveInt = pydantic.Field(256, examples=[20])
    attn_logit_softcapping: pydantic.PositiveFloat | None = pydantic.Field(50.0, examples=[50.0, None])
    final_logit_softcapping: pydantic.PositiveFloat | None = pydantic.Field(30.0, examples=[30.0, None])
    sliding_window: pydantic.PositiveInt | None = pydantic.Field(4096, examples=[6, 9])
    use_bidirectional_attention: Literal[False, None] = None

    def full_layer_every(self) -> int:
        """Distance of full layers when `layer_types` is not given."""
        return 2

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        return replace(
            super().decoder_config(),
            names=GEMMA_NAMES,
            norm_offset=True,
            qkv_bias=self.attention_bias,
            output_bias=self.attention_bias,
            attention_scale=self.query_pre_attn_scalar**-0.5,
            attention_cap=self.attn_logit_softcapping,
            logit_cap=self.final_logit_softcapping,
            embedding_scale=self.hidden_size**0.5,
            residual_scale=_RESIDUAL_SCALE,
        )


class Gemma3Settings(Gemma2Settings):
    """As `gemma2`, with RMSNorm of queries and keys, RoPE of its own for sliding layers, five of six layers sliding, no
    cap on scores.
    """

    model_type = "gemma3_text"
    models = "Gemma 3 270M and 1B, and the text part of others"

    max_position_embeddings: pydantic.PositiveInt = 131072
    attn_logit_softcapping: Literal[None] = None  # transformers ignores it here
    final_logit_softcapping: pydantic.PositiveFloat | None = pydantic.Field(None, examples=[None, 3.0])
    sliding_window_pattern: pydantic.PositiveInt = pydantic.Field(6, examples=[2])

    def full_layer_every(self) -> int:
        """Distance of full layers when `layer_types` is not given."""
        return self.sliding_window_pattern

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        return replace(super().decoder_config(), query_key_norm="head")
