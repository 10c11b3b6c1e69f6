"""Mistral 7B, Mistral Small 3 and their relatives."""

from __future__ import annotations

import pydantic

from edkm_export.decoder.families.settings import SlidingSettings

__all__ = ["MistralSettings"]


class MistralSettings(SlidingSettings):
    """Llama with a sliding window in every layer, or none."""

    model_type = "mistral"
    models = "Mistral 7B, Mistral Small 3"

    max_position_embeddings: pydantic.PositiveInt = 131072
    sliding_window: pydantic.PositiveInt | None = pydantic.Field(4096, examples=[7, None])
