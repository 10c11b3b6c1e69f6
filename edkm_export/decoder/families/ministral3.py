"""Ministral 3."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pydantic

from edkm_export.decoder.config import DecoderConfig
from edkm_export.decoder.families.settings import SlidingSettings

__all__ = ["Ministral3Settings"]

_GROWTH = ("llama_4_scaling_beta", "original_max_position_embeddings")


class Ministral3Settings(SlidingSettings):
    """YaRN, queries that grow with the logarithm of their position beyond the original context, a sliding window in
    every layer or none.
    """

    model_type = "ministral3"
    models = "Ministral 3"

    num_key_value_heads: pydantic.PositiveInt | None = 8
    head_dim: pydantic.PositiveInt | None = 128
    max_position_embeddings: pydantic.PositiveInt = 262144
    rms_norm_eps: pydantic.PositiveFloat = 1e-5
    sliding_window: pydantic.PositiveInt | None = pydantic.Field(None, examples=[None, 7])
    rope_parameters: dict[str, Any] = pydantic.Field(
        examples=[
            {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.5,
            }
        ]
    )

    @pydantic.field_validator("rope_parameters")
    @classmethod
    def _grows(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in _GROWTH:
            value = given.get(name)
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not 0 <= value < float("inf")
            ):
                raise ValueError(f"{name} is {value!r}, expected a positive number")
        return given

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        beta, original = (float(self.rope_parameters[name]) for name in _GROWTH)
        return replace(super().decoder_config(), query_growth=(beta, original) if beta else None)
