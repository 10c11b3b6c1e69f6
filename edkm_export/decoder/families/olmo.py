"""OLMo 2."""

from __future__ import annotations

from dataclasses import replace

import pydantic

from edkm_export.decoder.config import DecoderConfig, Names
from edkm_export.decoder.families.settings import POST_NORM_INNER_SCALE, RotarySettings

__all__ = ["Olmo2Settings"]

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
