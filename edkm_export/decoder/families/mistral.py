"""Mistral 7B and its relatives."""

from __future__ import annotations

import pydantic

from edkm_export.decoder.families.settings import RotarySettings

__all__ = ["MistralSettings"]


class MistralSettings(RotarySettings):
    """Llama with a sliding window in every layer, where the configuration gives one."""

    max_position_embeddings: pydantic.PositiveInt = 131072
    sliding_window: pydantic.PositiveInt | None = 4096
