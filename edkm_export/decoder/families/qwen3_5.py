"""The text models of Qwen3.5, without experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pydantic

from edkm_export.decoder.config import FULL, LINEAR, DecoderConfig, LinearAttention
from edkm_export.decoder.families.settings import PartlyRotarySettings

__all__ = ["Qwen35Settings"]

_KINDS = {"linear_attention": LINEAR, "full_attention": FULL}


class Qwen35Settings(PartlyRotarySettings):
    """Linear attention (gated DeltaNet) in most layers; the others have gated attention with RMSNorm of queries and
    keys, and a part of each head rotates.
    """

    model_type = "qwen3_5_text"
    models = "Qwen3.5 (text)"
    rotated_part = 0.25

    head_dim: pydantic.PositiveInt | None = pydantic.Field(256, examples=[16, 24])
    num_key_value_heads: pydantic.PositiveInt | None = 4
    max_position_embeddings: pydantic.PositiveInt = 32768
    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    linear_conv_kernel_dim: pydantic.PositiveInt = pydantic.Field(4, examples=[4, 3])
    linear_key_head_dim: pydantic.PositiveInt = pydantic.Field(128, examples=[8, 6])
    linear_value_head_dim: pydantic.PositiveInt = pydantic.Field(128, examples=[16, 10])
    linear_num_key_heads: pydantic.PositiveInt = pydantic.Field(16, examples=[2, 1])
    linear_num_value_heads: pydantic.PositiveInt = pydantic.Field(32, examples=[4, 3])
    full_attention_interval: pydantic.PositiveInt = pydantic.Field(4, examples=[2])
    layer_types: list[Literal["linear_attention", "full_attention"]] | None = pydantic.Field(
        None, examples=[["linear_attention", "full_attention"], ["full_attention", "linear_attention"]]
    )

    @pydantic.field_validator("linear_num_value_heads")
    @classmethod
    def _divides(cls, heads: int, known: pydantic.ValidationInfo) -> int:
        keys = known.data.get("linear_num_key_heads", heads)
        if heads % keys:
            raise ValueError(f"it must be a multiple of linear_num_key_heads, {keys}")
        return heads

    def layer_kinds(self) -> list[str]:
        """As `layer_types` says; without it, every fourth layer attends."""
        if self.layer_types is not None:
            return [_KINDS[each] for each in self.layer_types]
        every = self.full_attention_interval
        return [LINEAR if (layer + 1) % every else FULL for layer in range(self.num_hidden_layers)]

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        return replace(
            super().decoder_config(),
            layer_kinds=tuple(self.layer_kinds()),
            norm_offset=True,
            qkv_bias=self.attention_bias,
            output_bias=self.attention_bias,
            query_key_norm="head",
            attention_gate=True,
            kernel_size=self.linear_conv_kernel_dim,
            linear=LinearAttention(
                key_heads=self.linear_num_key_heads,
                value_heads=self.linear_num_value_heads,
                key_dim=self.linear_key_head_dim,
                value_dim=self.linear_value_head_dim,
            ),
        )
