"""Phi-3 and Phi-3.5 mini, Phi-4 mini."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pydantic

from edkm_export.decoder.config import DecoderConfig, Names
from edkm_export.decoder.families.settings import RotarySettings

__all__ = ["Phi3Settings"]


class Phi3Settings(RotarySettings):
    """Llama with fused projections; only a part of each head may rotate."""

    max_position_embeddings: pydantic.PositiveInt = 4096
    rms_norm_eps: pydantic.PositiveFloat = 1e-5
    rope_parameters: dict[str, Any] | None = None

    @pydantic.field_validator("rope_parameters")
    @classmethod
    def _rotates_a_part(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        part = (given or {}).get("partial_rotary_factor", 1.0)
        if isinstance(part, bool) or not isinstance(part, (int, float)) or not 0 < part <= 1:
            raise ValueError(f"partial_rotary_factor is {part!r}, expected more than 0 and at most 1")
        return given

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        config = super().decoder_config()
        part = float((self.rope_parameters or {}).get("partial_rotary_factor", 1.0))
        return replace(
            config,
            names=Names(attention_inputs=("qkv_proj",), mlp_inputs=("gate_up_proj",)),
            rotary_dim=int(config.head_dim * part),
        )
