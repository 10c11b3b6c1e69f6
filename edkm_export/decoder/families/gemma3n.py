"""The text models of Gemma 3n."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import pydantic

from edkm_export.decoder.config import AltUp, DecoderConfig, LayerEmbedding
from edkm_export.decoder.families.gemma import GEMMA_NAMES
from edkm_export.decoder.families.settings import (
    LAYER_KINDS,
    POST_NORM_INNER_SCALE,
    Activation,
    LayerType,
    LayerTypeSettings,
)

__all__ = ["Gemma3nSettings"]

_FULL_EVERY = 5
_SPARSE_LAYERS = 10
# As in Gemma 2 and 3, of all streams.
_RESIDUAL_SCALE = 2.0**-6

_Part = Annotated[float, pydantic.Field(ge=0, lt=1)]


def _usual_types(layers: int) -> list[LayerType]:
    return ["sliding_attention" if (layer + 1) % _FULL_EVERY else "full_attention" for layer in range(layers)]


class Gemma3nSettings(LayerTypeSettings):
    """Four residual streams of which a layer computes one and corrects the others (AltUp), a linear path beside
    attention (LAuReL), per-layer embeddings, sparse gates in the first layers; the last layers use keys and values of
    earlier ones; RMSNorm of queries, keys and values, RoPE of its own for sliding layers.
    """

    model_type = "gemma3n_text"
    models = "Gemma 3n E2B and E4B (text)"

    intermediate_size: int | list[int] = pydantic.Field(examples=[48, [48, 20, 32, 32, 32]])  # type: ignore[assignment]
    num_hidden_layers: pydantic.PositiveInt = pydantic.Field(examples=[3, 5])
    head_dim: pydantic.PositiveInt = 256
    num_key_value_heads: pydantic.PositiveInt = 2
    max_position_embeddings: pydantic.PositiveInt = 32_768
    hidden_act: Activation = pydantic.Field("gelu_pytorch_tanh", alias="hidden_activation")
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    sliding_window: pydantic.PositiveInt = pydantic.Field(512, examples=[6, 9])
    layer_types: list[LayerType] | None = pydantic.Field(
        None,
        min_length=1,
        examples=[
            ["sliding_attention", "full_attention", "full_attention"],
            [
                "full_attention",
                "sliding_attention",
                "sliding_attention",
                "sliding_attention",
                "full_attention",
            ],
        ],
    )
    final_logit_softcapping: pydantic.PositiveFloat | None = pydantic.Field(30.0, examples=[30.0, 3.0])
    vocab_size_per_layer_input: pydantic.PositiveInt = pydantic.Field(262_144, examples=[96, 90])
    hidden_size_per_layer_input: pydantic.PositiveInt = pydantic.Field(256, examples=[16, 10])
    altup_num_inputs: int = pydantic.Field(4, ge=2, examples=[4, 3])
    altup_active_idx: pydantic.NonNegativeInt = pydantic.Field(0, examples=[0, 1])
    altup_correct_scale: bool = True
    num_kv_shared_layers: pydantic.NonNegativeInt = pydantic.Field(examples=[1, 2])
    laurel_rank: pydantic.PositiveInt = pydantic.Field(64, examples=[16, 5])
    activation_sparsity_pattern: list[_Part] | None = pydantic.Field(
        None, examples=[[0.8, 0.0, 0.0], [0.95, 0.3, 0.0, 0.0, 0.5]]
    )

    @pydantic.field_validator("intermediate_size")
    @classmethod
    def _positive(cls, size: int | list[int]) -> int | list[int]:
        if any(each < 1 for each in (size if isinstance(size, list) else [size])):
            raise ValueError("it must be positive")
        return size

    @pydantic.field_validator("num_hidden_layers")
    @classmethod
    def _have_sizes(cls, layers: int, known: pydantic.ValidationInfo) -> int:
        size = known.data.get("intermediate_size")
        if isinstance(size, list) and len(size) != layers:
            raise ValueError(
                f"intermediate_size has {len(size)} values; it must have a size for each of the layers"
            )
        return layers

    @pydantic.field_validator("altup_active_idx")
    @classmethod
    def _is_a_stream(cls, active: int, known: pydantic.ValidationInfo) -> int:
        streams = known.data.get("altup_num_inputs", active + 1)
        if active >= streams:
            raise ValueError(f"it must be less than altup_num_inputs, {streams}")
        return active

    @pydantic.field_validator("num_kv_shared_layers")
    @classmethod
    def _has_sources(cls, shared: int, known: pydantic.ValidationInfo) -> int:
        types, layers = known.data.get("layer_types"), known.data.get("num_hidden_layers", 1)
        kinds = types or _usual_types(layers)
        if not set(kinds) <= set(kinds[: max(len(kinds) - shared, 0)]):
            raise ValueError("layers of each kind must come before those that share keys and values")
        return shared

    @pydantic.field_validator("activation_sparsity_pattern")
    @classmethod
    def _for_each_layer(cls, parts: list[float] | None, known: pydantic.ValidationInfo) -> list[float] | None:
        layers = known.data.get("num_hidden_layers", 0)
        if parts is not None and len(parts) != layers:
            raise ValueError(f"it must have a number for each of {layers} layers")
        return parts

    def usual_kinds(self) -> list[str]:
        """Kinds of the layers when `layer_types` is not given."""
        return [LAYER_KINDS[each] for each in _usual_types(self.num_hidden_layers)]

    def _inner_sizes(self) -> tuple[int, ...]:
        size = self.intermediate_size
        return tuple(size) if isinstance(size, list) else (size,) * self.num_hidden_layers

    def _sparsity(self) -> tuple[float, ...]:
        if self.activation_sparsity_pattern is not None:
            return tuple(self.activation_sparsity_pattern)
        sparse = _SPARSE_LAYERS if self.num_hidden_layers > _SPARSE_LAYERS else 0
        return (0.95,) * sparse + (0.0,) * (self.num_hidden_layers - sparse)

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        sizes = self._inner_sizes()
        return replace(
            super().decoder_config(),
            names=GEMMA_NAMES,
            intermediate_size=max(sizes),
            intermediate_sizes=sizes,
            sparsity=self._sparsity(),
            sharing_layers=self.num_kv_shared_layers,
            query_key_norm="head",
            value_norm=True,
            layer_embedding=LayerEmbedding(self.vocab_size_per_layer_input, self.hidden_size_per_layer_input),
            altup=AltUp(self.altup_num_inputs, self.altup_active_idx, self.altup_correct_scale),
            laurel_rank=self.laurel_rank,
            qkv_bias=self.attention_bias,
            output_bias=self.attention_bias,
            attention_scale=1.0,
            logit_cap=self.final_logit_softcapping,
            embedding_scale=self.hidden_size**0.5,
            residual_scale=_RESIDUAL_SCALE,
            inner_scale=POST_NORM_INNER_SCALE,
        )
