"""OLMo 2 and OLMo 3."""

from __future__ import annotations

from dataclasses import replace

import pydantic

from edkm_export.decoder.config import DecoderConfig, Names
from edkm_export.decoder.families.settings import (
    MIXED_LAYERS,
    POST_NORM_INNER_SCALE,
    LayerType,
    LayerTypeSettings,
    RotarySettings,
)

__all__ = ["Olmo2Settings", "Olmo3Settings"]

_NAMES = Names(
    attention_norm=None,
    attention_output_norm="post_attention_layernorm",
    mlp_norm=None,
    mlp_output_norm="post_feedforward_layernorm",
)


class Olmo2Settings(RotarySettings):
    """Norms only after attention and MLP (post-norm), RMSNorm over all channels of the queries and of the keys."""

    model_type = "olmo2"
    models = "OLMo 2"

    rms_norm_eps: pydantic.PositiveFloat = 1e-5
    attention_bias: bool = False

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        return replace(
            super().decoder_config(),
            names=_NAMES,
            query_key_norm="whole",
            qkv_bias=self.attention_bias,
            output_bias=self.attention_bias,
            inner_scale=POST_NORM_INNER_SCALE,
        )


class Olmo3Settings(Olmo2Settings, LayerTypeSettings):
    """As `olmo2`, with three of four layers sliding, and RoPE scaling (YaRN) in full layers only."""

    model_type = "olmo3"
    models = "OLMo 3"

    sliding_window: pydantic.PositiveInt | None = pydantic.Field(4096, examples=[6, 3])
    layer_types: list[LayerType] | None = pydantic.Field(None, examples=MIXED_LAYERS)

    def full_layer_every(self) -> int:
        """Distance of full layers when `layer_types` is not given."""
        return 4
