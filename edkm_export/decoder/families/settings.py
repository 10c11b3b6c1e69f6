"""What the decoder needs of a Hugging Face configuration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import pydantic

from edkm_export.decoder.config import FULL, SLIDING, DecoderConfig

__all__ = ["KINDS", "Activation", "LayerType", "RotarySettings", "Settings"]

Activation = Literal["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"]
LayerType = Literal["full_attention", "sliding_attention"]
KINDS: dict[LayerType, str] = {"full_attention": FULL, "sliding_attention": SLIDING}
"""Kinds of layers by their names in `layer_types`."""


class Settings(pydantic.BaseModel, ABC):
    """Keys of a family's configuration. Files come from anywhere, so every value is checked.

    A key with values that the decoder cannot serve is a `Literal` of those that it can. Defaults are those of
    transformers.
    """

    model_type: ClassVar[str]
    models: ClassVar[str]

    model_config = pydantic.ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    @abstractmethod
    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""


class RotarySettings(Settings):
    """Keys of the families that descend from Llama, which add their own and override the two methods."""

    vocab_size: pydantic.PositiveInt
    hidden_size: pydantic.PositiveInt
    intermediate_size: pydantic.PositiveInt
    num_hidden_layers: pydantic.PositiveInt
    num_attention_heads: pydantic.PositiveInt
    num_key_value_heads: pydantic.PositiveInt | None = None
    head_dim: pydantic.PositiveInt | None = None
    max_position_embeddings: pydantic.PositiveInt = 2048
    rms_norm_eps: pydantic.PositiveFloat = 1e-6
    hidden_act: Activation = "silu"
    tie_word_embeddings: bool = False
    sliding_window: pydantic.PositiveInt | None = None

    def layer_kinds(self) -> list[str]:
        """FULL or SLIDING for each layer; here the same for all."""
        return [FULL if self.sliding_window is None else SLIDING] * self.num_hidden_layers

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        kinds = tuple(self.layer_kinds())
        heads = self.num_attention_heads
        head_dim = self.head_dim or self.hidden_size // heads
        return DecoderConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_heads=heads,
            num_kv_heads=self.num_key_value_heads or heads,
            head_dim=head_dim,
            max_positions=self.max_position_embeddings,
            norm_eps=self.rms_norm_eps,
            layer_kinds=kinds,
            sliding_window=self.sliding_window if SLIDING in kinds else None,
            rotary_dim=head_dim,
            activation=self.hidden_act,
            tied=self.tie_word_embeddings,
        )
