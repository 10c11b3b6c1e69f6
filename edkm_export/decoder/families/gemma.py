"""Gemma 2 and the text models of Gemma 3."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pydantic

from edkm_export.decoder.config import FULL, SLIDING, DecoderConfig, Names
from edkm_export.decoder.families.settings import KINDS, Activation, LayerType, RotarySettings

__all__ = ["Gemma2Settings", "Gemma3Settings"]

_NAMES = Names(
    attention_output_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
)
# Residual streams of trained Gemmas pass 65,504, the end of float16. Held 64 times smaller they have room up to
# 4.2 million, and a channel is exact to 11 bits from 0.004 on.
_RESIDUAL_SCALE = 2.0**-6


class Gemma2Settings(RotarySettings):
    """Pre- and post-norms around attention and MLP, soft caps, scaled embeddings, every other layer slides."""

    head_dim: pydantic.PositiveInt = 256
    max_position_embeddings: pydantic.PositiveInt = 8192
    hidden_act: Activation = pydantic.Field("gelu_pytorch_tanh", alias="hidden_activation")
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    query_pre_attn_scalar: pydantic.PositiveFloat = 256.0
    attn_logit_softcapping: pydantic.PositiveFloat | None = 50.0
    final_logit_softcapping: pydantic.PositiveFloat | None = 30.0
    sliding_window: pydantic.PositiveInt | None = 4096
    layer_types: list[LayerType] | None = None
    use_bidirectional_attention: Literal[False, None] = None

    def full_layer_every(self) -> int:
        """Distance of full layers when `layer_types` is not given."""
        return 2

    def layer_kinds(self) -> list[str]:
        """As `layer_types` says, or in a fixed pattern."""
        if self.layer_types is not None:
            return [KINDS[each] for each in self.layer_types]
        every = self.full_layer_every()
        return [SLIDING if (layer + 1) % every else FULL for layer in range(self.num_hidden_layers)]

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        return replace(
            super().decoder_config(),
            names=_NAMES,
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
    """Gemma 2 with normalized queries and keys, RoPE of its own for sliding layers, and most layers sliding.

    transformers ignores the soft cap of attention here, so a configuration that sets one is refused.
    """

    max_position_embeddings: pydantic.PositiveInt = 131072
    attn_logit_softcapping: Literal[None] = None
    final_logit_softcapping: pydantic.PositiveFloat | None = None
    use_bidirectional_attention: bool | None = None  # type: ignore[assignment]
    sliding_window_pattern: pydantic.PositiveInt = 6

    def full_layer_every(self) -> int:
        """Distance of full layers when `layer_types` is not given."""
        return self.sliding_window_pattern

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        config = replace(super().decoder_config(), query_key_norm=True)
        if not self.use_bidirectional_attention:
            return config
        # transformers halves the window of the file: so far a token sees to either side
        window = None if config.sliding_window is None else config.sliding_window // 2 + 1
        return replace(config, bidirectional=True, sliding_window=window)
