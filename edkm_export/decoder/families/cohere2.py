"""Cohere 2: Command R7B, Command A."""

from __future__ import annotations

from dataclasses import replace

import pydantic

from edkm_export.decoder.config import FULL, DecoderConfig, Names
from edkm_export.decoder.families.settings import MIXED_LAYERS, LayerType, LayerTypeSettings

__all__ = ["Cohere2Settings"]


class Cohere2Settings(LayerTypeSettings):
    """Attention and MLP side by side behind one layer norm without bias, RoPE of neighbouring channels in sliding
    layers, full layers without positions, scaled logits.
    """

    model_type = "cohere2"
    models = "Command R7B, Command A"

    max_position_embeddings: pydantic.PositiveInt = 8192
    rms_norm_eps: pydantic.PositiveFloat = pydantic.Field(1e-5, alias="layer_norm_eps")
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    logit_scale: pydantic.PositiveFloat = pydantic.Field(0.0625, examples=[0.5, 1.5])
    sliding_window: pydantic.PositiveInt | None = pydantic.Field(4096, examples=[6, 3])
    sliding_window_pattern: pydantic.PositiveInt = 4
    layer_types: list[LayerType] | None = pydantic.Field(None, examples=MIXED_LAYERS)

    def full_layer_every(self) -> int:
        """Distance of full layers when `layer_types` is not given."""
        return self.sliding_window_pattern

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        config = super().decoder_config()
        return replace(
            config,
            names=Names(mlp_norm=None),
            norm="layer",
            norm_bias=False,
            parallel=True,
            rotary_interleaved=True,
            unrotated=frozenset(layer for layer, kind in enumerate(config.layer_kinds) if kind == FULL),
            qkv_bias=self.attention_bias,
            output_bias=self.attention_bias,
            logit_scale=self.logit_scale,
        )
