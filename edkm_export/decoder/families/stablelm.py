"""StableLM."""

from __future__ import annotations

from dataclasses import replace

import pydantic

from edkm_export.decoder.config import DecoderConfig, Names
from edkm_export.decoder.families.settings import PartlyRotarySettings

__all__ = ["StableLmSettings"]


class StableLmSettings(PartlyRotarySettings):
    """Layer norms with bias, RoPE on a quarter of each head, attention and MLP one after the other or side by side, a
    layer norm for each head of queries and keys where `qk_layernorm` says so.
    """

    model_type = "stablelm"
    models = "StableLM 3B, Stable LM 2, Stable Code"
    rotated_part = 0.25

    num_key_value_heads: pydantic.PositiveInt | None = 32
    max_position_embeddings: pydantic.PositiveInt = 4096
    head_dim: pydantic.PositiveInt | None = pydantic.Field(None, examples=[])
    rms_norm_eps: pydantic.PositiveFloat = pydantic.Field(1e-5, alias="layer_norm_eps")
    use_qkv_bias: bool = False
    qk_layernorm: bool = False
    use_parallel_residual: bool = False

    @pydantic.field_validator("head_dim")
    @classmethod
    def _is_a_share(cls, given: int | None, known: pydantic.ValidationInfo) -> int | None:
        hidden, heads = known.data.get("hidden_size", 0), known.data.get("num_attention_heads", 1)
        if given is not None and given * heads != hidden:
            raise ValueError(f"{heads} heads of it do not make hidden_size, {hidden}")
        return given

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        names = Names(query_norm="q_layernorm", key_norm="k_layernorm")
        if self.use_parallel_residual:
            names = replace(names, mlp_norm=None)
        return replace(
            super().decoder_config(),
            names=names,
            norm="layer",
            parallel=self.use_parallel_residual,
            query_key_norm="apart" if self.qk_layernorm else None,
            qkv_bias=self.use_qkv_bias,
        )
