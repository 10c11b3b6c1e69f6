"""The text models of Gemma 4, without experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pydantic

from edkm_export.decoder.config import ATTENDS, FULL, SLIDING, DecoderConfig, HeadSizes, LayerEmbedding
from edkm_export.decoder.families.gemma import GEMMA_NAMES
from edkm_export.decoder.families.settings import (
    LAYER_KINDS,
    POST_NORM_INNER_SCALE,
    Activation,
    LayerType,
    LayerTypeSettings,
)

__all__ = ["Gemma4Settings"]

_FULL_EVERY = 6
_PER_LAYER = {"head_dim", "num_key_value_heads"}  # what a layer may have for itself
# As in Gemma 2 and 3. Here each layer ends with a number of its own, 0.005 to 0.92 in the 12B (as its users report),
# which keeps the stream small where it is trained to; what a layer adds before that is as large as ever.
_RESIDUAL_SCALE = 2.0**-6


def _kinds(types: list[LayerType] | None, layers: int) -> list[str]:
    """FULL or SLIDING for each layer: as named, or five of six sliding; the last one is full in any case."""
    if types is None:
        kinds = [SLIDING if (layer + 1) % _FULL_EVERY else FULL for layer in range(layers)]
    else:
        kinds = [LAYER_KINDS[each] for each in types]
    return [*kinds[:-1], FULL]


class Gemma4Settings(LayerTypeSettings):
    """Norms before and after attention and MLP; RMSNorm of queries, keys and values; heads of full layers have sizes
    and RoPE of their own, in a part of the head; the last layers use keys and values of earlier ones; per-layer
    embeddings; a scalar for each layer; no experts.
    """

    model_type = "gemma4_text"
    models = "Gemma 4 E2B, E4B and 31B"

    num_hidden_layers: pydantic.PositiveInt = pydantic.Field(examples=[3, 5])
    head_dim: pydantic.PositiveInt = 256
    global_head_dim: pydantic.PositiveInt = pydantic.Field(512, examples=[24, 10])
    num_key_value_heads: pydantic.PositiveInt | None = 4
    num_global_key_value_heads: pydantic.PositiveInt | None = pydantic.Field(None, examples=[None, 2])
    per_layer_config: dict[str, Any] | None = None
    max_position_embeddings: pydantic.PositiveInt = 131_072
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
    final_logit_softcapping: pydantic.PositiveFloat | None = pydantic.Field(None, examples=[None, 3.0])
    use_bidirectional_attention: Literal["vision", None] = None  # of images; a text has none
    vocab_size_per_layer_input: pydantic.PositiveInt = pydantic.Field(262_144, examples=[320])
    hidden_size_per_layer_input: pydantic.NonNegativeInt = pydantic.Field(256, examples=[16, 10])
    attention_k_eq_v: bool = False
    num_kv_shared_layers: pydantic.NonNegativeInt = pydantic.Field(0, examples=[1, 2])
    use_double_wide_mlp: bool = False
    enable_moe_block: Literal[False] = False

    @pydantic.field_validator("per_layer_config")
    @classmethod
    def _one_size_a_kind(
        cls, given: dict[str, Any] | None, known: pydantic.ValidationInfo
    ) -> dict[str, Any] | None:
        for layer, settings in (given or {}).items():
            if not isinstance(settings, dict) or not settings.keys() <= _PER_LAYER:
                raise ValueError(f"layer {layer!r} may have head_dim and num_key_value_heads of its own")
            if not all(type(value) is int and value > 0 for value in settings.values()):
                raise ValueError(f"layer {layer!r} must have positive numbers")
        kinds = _kinds(known.data.get("layer_types"), known.data.get("num_hidden_layers", 1))
        for kind in ATTENDS:
            of_kind = [(given or {}).get(str(layer), {}) for layer, each in enumerate(kinds) if each == kind]
            if any(each != of_kind[0] for each in of_kind):
                raise ValueError("layers of a kind must have heads of one size")
        return given

    @pydantic.field_validator("hidden_size_per_layer_input")
    @classmethod
    def _knows_every_token(cls, size: int, known: pydantic.ValidationInfo) -> int:
        rows, vocabulary = (known.data.get(key, 1) for key in ("vocab_size_per_layer_input", "vocab_size"))
        if size and rows < vocabulary:
            raise ValueError(
                f"its table has vocab_size_per_layer_input rows, {rows}, fewer than vocab_size, {vocabulary}"
            )
        return size

    @pydantic.field_validator("num_kv_shared_layers")
    @classmethod
    def _has_sources(cls, shared: int, known: pydantic.ValidationInfo) -> int:
        kinds = _kinds(known.data.get("layer_types"), known.data.get("num_hidden_layers", 1))
        if not set(kinds) <= set(kinds[: max(len(kinds) - shared, 0)]):
            raise ValueError("layers of each kind must come before those that share keys and values")
        return shared

    def layer_kinds(self) -> list[str]:
        """As `layer_types` says, or five of six sliding; the last layer is full in any case."""
        return _kinds(self.layer_types, self.num_hidden_layers)

    def _sizes(self, layer: int) -> HeadSizes:
        """Of one layer: its own, or those of its kind."""
        heads, head_dim = self.num_key_value_heads or self.num_attention_heads, self.head_dim
        if self.per_layer_config is not None:
            own = self.per_layer_config.get(str(layer), {})
            return HeadSizes(own.get("num_key_value_heads", heads), own.get("head_dim", head_dim))
        if self.layer_kinds()[layer] != FULL:
            return HeadSizes(heads, head_dim)
        if self.attention_k_eq_v and self.num_global_key_value_heads is not None:
            heads = self.num_global_key_value_heads
        return HeadSizes(heads, self.global_head_dim)

    def _inner_sizes(self) -> tuple[int, ...]:
        """Of the MLPs: twice as large in layers that share keys and values, where the configuration says so."""
        if not self.use_double_wide_mlp:
            return ()
        own = self.num_hidden_layers - self.num_kv_shared_layers
        return tuple(self.intermediate_size * (1 if i < own else 2) for i in range(self.num_hidden_layers))

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        config, kinds = super().decoder_config(), self.layer_kinds()
        sizes = {kind: self._sizes(kinds.index(kind)) for kind in ATTENDS if kind in kinds}
        most = sizes.get(SLIDING, sizes[FULL])
        return replace(
            config,
            names=GEMMA_NAMES,
            num_kv_heads=most.kv_heads,
            head_dim=most.head_dim,
            rotary_dim=most.head_dim,
            full_heads=None if sizes[FULL] == most else sizes[FULL],
            sharing_layers=self.num_kv_shared_layers,
            query_key_norm="head",
            value_norm=True,
            values_from_keys=self.attention_k_eq_v,
            intermediate_sizes=self._inner_sizes(),
            layer_scalar=True,
            layer_embedding=LayerEmbedding(self.vocab_size_per_layer_input, self.hidden_size_per_layer_input)
            if self.hidden_size_per_layer_input
            else None,
            qkv_bias=self.attention_bias,
            output_bias=self.attention_bias,
            attention_scale=1.0,
            logit_cap=self.final_logit_softcapping,
            embedding_scale=self.hidden_size**0.5,
            residual_scale=_RESIDUAL_SCALE,
            inner_scale=POST_NORM_INNER_SCALE,
        )
