"""Granite 3 and 4 without experts and without Mamba layers."""

from __future__ import annotations

from dataclasses import replace

import pydantic

from edkm_export.decoder.config import DecoderConfig
from edkm_export.decoder.families.llama import LlamaSettings

__all__ = ["GraniteSettings"]


class GraniteSettings(LlamaSettings):
    """Llama with four multipliers: of embeddings, of scores, of what attention and MLP add, and of logits."""

    model_type = "granite"
    models = "Granite 3"

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
        )
