"""Llama 2 and 3, SmolLM2, TinyLlama."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from edkm_export.decoder.config import DecoderConfig
from edkm_export.decoder.families.settings import RotarySettings

__all__ = ["LlamaSettings"]


class LlamaSettings(RotarySettings):
    """RMSNorm, RoPE (default, linear, llama3, yarn; dynamic within its context), grouped-query attention, gated MLP,
    biases where the configuration asks for them.
    """

    model_type = "llama"
    models = "Llama 2 and 3, SmolLM2, TinyLlama"

    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: Literal[None] = None

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        return replace(
            super().decoder_config(),
            qkv_bias=self.attention_bias,
            output_bias=self.attention_bias,
            mlp_bias=self.mlp_bias,
        )
