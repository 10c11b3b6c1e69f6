"""EXAONE 4."""

from __future__ import annotations

from dataclasses import replace

import pydantic

from edkm_export.decoder.config import FULL, DecoderConfig, Names
from edkm_export.decoder.families.settings import (
    MIXED_LAYERS,
    POST_NORM_INNER_SCALE,
    LayerType,
    LayerTypeSettings,
)

__all__ = ["Exaone4Settings"]


class Exaone4Settings(LayerTypeSettings):
    """Norms only after attention and MLP, RMSNorm of queries and keys head by head; with a sliding window, three of
    four layers slide and the others know no positions.
    """

    model_type = "exaone4"
    models = "EXAONE 4"

    num_key_value_heads: pydantic.PositiveInt | None = 32
    rms_norm_eps: pydantic.PositiveFloat = 1e-5
    sliding_window: pydantic.PositiveInt | None = pydantic.Field(4096, examples=[6, None])
    sliding_window_pattern: pydantic.NonNegativeInt | str | None = pydantic.Field(4, examples=[4])
    layer_types: list[LayerType] | None = pydantic.Field(
        None, examples=[MIXED_LAYERS[0], ["full_attention", "full_attention"]]
    )

    @pydantic.field_validator("sliding_window_pattern")
    @classmethod
    def _counts(cls, given: int | str | None, known: pydantic.ValidationInfo) -> int | str | None:
        if known.data.get("layer_types") is None and (not isinstance(given, int) or not given):
            raise ValueError("layer_types must be given where it is no number")
        return given

    def full_layer_every(self) -> int:
        """Distance of full layers when `layer_types` is not given."""
        assert isinstance(self.sliding_window_pattern, int), "it was checked"
        return self.sliding_window_pattern

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        config = super().decoder_config()
        still = () if self.sliding_window is None else enumerate(config.layer_kinds)
        return replace(
            config,
            names=Names(
                attention_norm=None,
                attention_output_norm="post_attention_layernorm",
                mlp_norm=None,
                mlp_output_norm="post_feedforward_layernorm",
            ),
            query_key_norm="head",
            unrotated=frozenset(layer for layer, kind in still if kind == FULL),
            inner_scale=POST_NORM_INNER_SCALE,
        )
