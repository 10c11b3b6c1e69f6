"""SmolLM3."""

from __future__ import annotations

from dataclasses import replace

import pydantic

from edkm_export.decoder.config import FULL, SLIDING, DecoderConfig
from edkm_export.decoder.families.settings import LayerTypeSettings

__all__ = ["SmolLM3Settings"]


class SmolLM3Settings(LayerTypeSettings):
    """Llama in which every fourth layer, or those of `no_rope_layers`, knows no positions; sliding layers by
    `layer_types`.
    """

    model_type = "smollm3"
    models = "SmolLM3"

    num_key_value_heads: pydantic.PositiveInt | None = 4
    max_position_embeddings: pydantic.PositiveInt = 32768
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: pydantic.PositiveInt | None = pydantic.Field(None, examples=[None, 5])
    no_rope_layers: list[int] | None = pydantic.Field(None, examples=[[1, 0, 1], None])
    no_rope_layer_interval: pydantic.PositiveInt = pydantic.Field(4, examples=[4, 2])

    @pydantic.field_validator("no_rope_layers")
    @classmethod
    def _enough(cls, given: list[int] | None, known: pydantic.ValidationInfo) -> list[int] | None:
        layers = known.data.get("num_hidden_layers", 0)
        if given is not None and len(given) < layers:
            raise ValueError(f"it must name {layers} layers or more")
        return given

    def rotates(self) -> list[bool]:
        """Whether each layer knows positions."""
        layers = range(self.num_hidden_layers)
        if self.no_rope_layers is not None:
            return [bool(self.no_rope_layers[layer]) for layer in layers]
        return [(layer + 1) % self.no_rope_layer_interval != 0 for layer in layers]

    def usual_kinds(self) -> list[str]:
        """Kinds of the layers when `layer_types` is not given: those without positions slide if any do."""
        slides = self.use_sliding_window and self.sliding_window is not None
        return [SLIDING if slides and not rotates else FULL for rotates in self.rotates()]

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        return replace(
            super().decoder_config(),
            unrotated=frozenset(layer for layer, rotates in enumerate(self.rotates()) if not rotates),
            qkv_bias=self.attention_bias,
            output_bias=self.attention_bias,
            mlp_bias=self.mlp_bias,
        )
