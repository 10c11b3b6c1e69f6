"""Qwen2, Qwen2.5 and Qwen3, without experts."""

from __future__ import annotations

from dataclasses import replace

import pydantic

from edkm_export.decoder.config import FULL, SLIDING, DecoderConfig
from edkm_export.decoder.families.settings import LayerTypeSettings

__all__ = ["Qwen2Settings", "Qwen3Settings"]


class Qwen2Settings(LayerTypeSettings):
    """Biases of queries, keys and values; sliding layers by `layer_types`, or from `max_window_layers` on."""

    model_type = "qwen2"
    models = "Qwen2, Qwen2.5"

    max_position_embeddings: pydantic.PositiveInt = 32768
    use_sliding_window: bool = False
    sliding_window: pydantic.PositiveInt | None = pydantic.Field(4096, examples=[5])
    max_window_layers: pydantic.NonNegativeInt = pydantic.Field(28, examples=[28, 1])

    def usual_kinds(self) -> list[str]:
        """Kinds of the layers when `layer_types` is not given: those from `max_window_layers` on slide."""
        slides = self.use_sliding_window and self.sliding_window is not None
        first = self.max_window_layers if slides else self.num_hidden_layers
        return [FULL if layer < first else SLIDING for layer in range(self.num_hidden_layers)]

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        return replace(super().decoder_config(), qkv_bias=True)


class Qwen3Settings(Qwen2Settings):
    """As `qwen2`, with RMSNorm of queries and keys head by head, and biases only where the configuration asks for
    them.
    """

    model_type = "qwen3"
    models = "Qwen3"

    head_dim: pydantic.PositiveInt | None = 128
    attention_bias: bool = False

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        bias = self.attention_bias
        return replace(super().decoder_config(), qkv_bias=bias, output_bias=bias, query_key_norm="head")
