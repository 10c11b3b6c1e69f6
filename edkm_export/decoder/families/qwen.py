"""Qwen2, Qwen2.5 and Qwen3, without experts."""

from __future__ import annotations

from dataclasses import replace

import pydantic

from edkm_export.decoder.config import FULL, SLIDING, DecoderConfig
from edkm_export.decoder.families.settings import KINDS, LayerType, RotarySettings

__all__ = ["Qwen2Settings", "Qwen3Settings"]


class Qwen2Settings(RotarySettings):
    """Llama with biases of queries, keys and values, and a sliding window in some layers."""

    max_position_embeddings: pydantic.PositiveInt = 32768
    use_sliding_window: bool = False
    sliding_window: pydantic.PositiveInt | None = 4096
    max_window_layers: pydantic.NonNegativeInt = 28
    layer_types: list[LayerType] | None = None

    def layer_kinds(self) -> list[str]:
        """As `layer_types` says; without it, layers from `max_window_layers` on slide."""
        if self.layer_types is not None:
            return [KINDS[each] for each in self.layer_types]
        slides = self.use_sliding_window and self.sliding_window is not None
        first = self.max_window_layers if slides else self.num_hidden_layers
        return [FULL if layer < first else SLIDING for layer in range(self.num_hidden_layers)]

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        return replace(super().decoder_config(), qkv_bias=True)


class Qwen3Settings(Qwen2Settings):
    """Qwen2 with normalized queries and keys; biases only where the configuration asks for them."""

    head_dim: pydantic.PositiveInt | None = 128
    attention_bias: bool = False

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        bias = self.attention_bias
        return replace(super().decoder_config(), qkv_bias=bias, output_bias=bias, query_key_norm=True)
