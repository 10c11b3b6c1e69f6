"""GPT-2 and models of its architecture (DistilGPT-2)."""

from __future__ import annotations

from typing import Literal

import pydantic

from edkm_export.decoder.config import FULL, DecoderConfig, Names
from edkm_export.decoder.families.settings import Activation, Settings

__all__ = ["GPT2Settings"]

_NAMES = Names(
    stack="transformer",
    embedding="wte",
    positions="wpe",
    layers="h",
    final_norm="ln_f",
    attention="attn",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    attention_inputs=("c_attn",),
    attention_output="c_proj",
    mlp_inputs=("c_fc",),
    mlp_output="c_proj",
)


class GPT2Settings(Settings):
    """Learned positions, layer norms with bias, biases everywhere, fused projection, MLP without gate."""

    model_type = "gpt2"
    models = "GPT-2, DistilGPT-2"

    vocab_size: pydantic.PositiveInt
    n_positions: pydantic.PositiveInt = 1024
    n_embd: pydantic.PositiveInt
    n_layer: pydantic.PositiveInt
    n_head: pydantic.PositiveInt
    n_inner: pydantic.PositiveInt | None = pydantic.Field(None, examples=[None, 40])
    activation_function: Activation = "gelu_new"
    layer_norm_epsilon: pydantic.PositiveFloat = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: Literal[False] = False
    add_cross_attention: Literal[False] = False
    tie_word_embeddings: bool = True

    @pydantic.field_validator("n_head")
    @classmethod
    def _divides(cls, heads: int, known: pydantic.ValidationInfo) -> int:
        width = known.data.get("n_embd", heads)
        if width % heads:
            raise ValueError(f"it must divide n_embd, {width}")
        return heads

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        return DecoderConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.n_embd,
            intermediate_size=self.n_inner or 4 * self.n_embd,
            num_heads=self.n_head,
            num_kv_heads=self.n_head,
            head_dim=self.n_embd // self.n_head,
            max_positions=self.n_positions,
            norm_eps=self.layer_norm_epsilon,
            layer_kinds=(FULL,) * self.n_layer,
            norm="layer",
            activation=self.activation_function,
            gated=False,
            qkv_bias=True,
            output_bias=True,
            mlp_bias=True,
            attention_scale=None if self.scale_attn_weights else 1.0,
            tied=self.tie_word_embeddings,
            names=_NAMES,
        )
