"""Phi-3 and Phi-3.5 mini, Phi-4 mini."""

from __future__ import annotations

from dataclasses import replace

import pydantic

from edkm_export.decoder.config import DecoderConfig, Names
from edkm_export.decoder.families.settings import PartlyRotarySettings, SlidingSettings

__all__ = ["Phi3Settings"]


class Phi3Settings(PartlyRotarySettings, SlidingSettings):
    """Fused projections, RoPE on a part of each head, sliding window; longrope within
    `original_max_position_embeddings`.
    """

    model_type = "phi3"
    models = "Phi-3 and Phi-3.5 mini, Phi-4 mini"

    max_position_embeddings: pydantic.PositiveInt = 4096
    rms_norm_eps: pydantic.PositiveFloat = 1e-5
    sliding_window: pydantic.PositiveInt | None = pydantic.Field(None, examples=[11, None])

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        return replace(
            super().decoder_config(),
            names=Names(attention_inputs=("qkv_proj",), mlp_inputs=("gate_up_proj",)),
        )
