"""What the decoder needs of a Hugging Face configuration, and what a family says of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, Literal

import pydantic

from edkm_export.decoder.config import FULL, SLIDING, DecoderConfig

__all__ = [
    "LAYER_KINDS",
    "MIXED_LAYERS",
    "POST_NORM_INNER_SCALE",
    "Activation",
    "LayerType",
    "LayerTypeSettings",
    "PartlyRotarySettings",
    "RotarySettings",
    "Settings",
    "SlidingSettings",
]

Activation = Literal["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"]
LayerType = Literal["full_attention", "sliding_attention"]
LAYER_KINDS: dict[LayerType, str] = {"full_attention": FULL, "sliding_attention": SLIDING}
"""{type of a layer in a configuration: its kind}."""
MIXED_LAYERS: list[Any] = [
    ["sliding_attention", "full_attention"],
    ["full_attention", "sliding_attention"],
]
"""Examples of `layer_types`."""
POST_NORM_INNER_SCALE = 2.0**-6
"""Where no norm bounds what an MLP reads, gate times values grows with the square of the residual stream, and at 256
it would leave float16. Held 64 times smaller it has room for a stream eight times larger, and the norm of the MLP's
output takes the factor away again. A power of two changes no bit of the result."""


class Settings(pydantic.BaseModel, ABC):
    """Keys of a family's configuration. Files come from anywhere, so every value is checked.

    A key with values that the decoder cannot serve is a `Literal` of those that it can. Defaults are those of
    transformers. `examples` of a field are values for models of a few channels, the first one for a plain model, and
    none at all where the key is best left out: the tests build models of a family from its fields.

    A family's docstring is its row in docs/families.md.

    Attributes:
        model_type: of the Hugging Face configuration.
        models: known ones of the family.
        published_layer_types: {type of a layer as transformers writes it now: as published configurations have it},
            where they differ; other programs know the latter alone.
    """

    model_type: ClassVar[str]
    models: ClassVar[str]
    published_layer_types: ClassVar[dict[str, str]] = {}

    model_config = pydantic.ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    @abstractmethod
    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""


class RotarySettings(Settings):
    """Keys of the families that descend from Llama, which add their own and override the method."""

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

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
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
            layer_kinds=(FULL,) * self.num_hidden_layers,
            rotary_dim=head_dim,
            activation=self.hidden_act,
            tied=self.tie_word_embeddings,
        )


class SlidingSettings(RotarySettings):
    """Keys of families in which every layer slides, where a window is given."""

    sliding_window: pydantic.PositiveInt | None = None

    def layer_kinds(self) -> list[str]:
        """FULL or SLIDING for each layer."""
        return [FULL if self.sliding_window is None else SLIDING] * self.num_hidden_layers

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        kinds = tuple(self.layer_kinds())
        window = self.sliding_window if SLIDING in kinds else None
        return replace(super().decoder_config(), layer_kinds=kinds, sliding_window=window)


class LayerTypeSettings(SlidingSettings):
    """Keys of families in which some layers slide: those that `layer_types` names, or every so manieth is full."""

    layer_types: list[LayerType] | None = None

    def layer_kinds(self) -> list[str]:
        """As `layer_types` says, or in a pattern of the family."""
        if self.layer_types is not None:
            return [LAYER_KINDS[each] for each in self.layer_types]
        return self.usual_kinds()

    def usual_kinds(self) -> list[str]:
        """Kinds of the layers when `layer_types` is not given."""
        every = self.full_layer_every()
        return [SLIDING if (layer + 1) % every else FULL for layer in range(self.num_hidden_layers)]

    def full_layer_every(self) -> int:
        """Distance of full layers when `layer_types` is not given."""
        return 1


class PartlyRotarySettings(RotarySettings):
    """Keys of families in which only the first part of each head may rotate."""

    rotated_part: ClassVar[float] = 1.0  # the part where a configuration gives none
    rope_parameters: dict[str, Any] | None = None

    @pydantic.field_validator("rope_parameters")
    @classmethod
    def _rotates_a_part(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        part = (given or {}).get("partial_rotary_factor", cls.rotated_part)
        if isinstance(part, bool) or not isinstance(part, (int, float)) or not 0 < part <= 1:
            raise ValueError(f"partial_rotary_factor is {part!r}, expected more than 0 and at most 1")
        return given

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        config = super().decoder_config()
        part = float((self.rope_parameters or {}).get("partial_rotary_factor", self.rotated_part))
        return replace(config, rotary_dim=int(config.head_dim * part))
