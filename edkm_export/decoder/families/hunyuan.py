"""Hunyuan, dense."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pydantic

from edkm_export.decoder.config import DecoderConfig, Names
from edkm_export.decoder.families.settings import RotarySettings

__all__ = ["HunyuanSettings"]


class HunyuanSettings(RotarySettings):
    """RMSNorm of queries and keys head by head after the rotation, whose base a fixed `alpha` stretches."""

    model_type = "hunyuan_v1_dense"
    models = "Hunyuan 0.5B to 7B"

    rms_norm_eps: pydantic.PositiveFloat = 1e-5
    attention_bias: bool = False
    rope_parameters: dict[str, Any] | None = pydantic.Field(
        None,
        examples=[
            {"rope_type": "dynamic", "rope_theta": 100.0, "alpha": 50.0, "factor": 1.0},
            {"rope_type": "default", "rope_theta": 100.0},
        ],
    )

    @pydantic.field_validator("rope_parameters")
    @classmethod
    def _stretches(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        alpha = (given or {}).get("alpha")
        if alpha is not None and (
            isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha < float("inf")
        ):
            raise ValueError(f"alpha is {alpha!r}, expected a positive number")
        return given

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        given = self.rope_parameters or {}
        alpha = given.get("alpha") if given.get("rope_type") == "dynamic" else None
        return replace(
            super().decoder_config(),
            names=Names(query_norm="query_layernorm", key_norm="key_layernorm"),
            query_key_norm="head",
            query_key_norm_last=True,
            rotary_alpha=float(alpha) if alpha else None,
            qkv_bias=self.attention_bias,
            output_bias=self.attention_bias,
        )
