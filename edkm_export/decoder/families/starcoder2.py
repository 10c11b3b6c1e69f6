"""StarCoder2."""

from __future__ import annotations

from dataclasses import replace

import pydantic

from edkm_export.decoder.config import DecoderConfig, Names
from edkm_export.decoder.families.settings import Activation, SlidingSettings

__all__ = ["Starcoder2Settings"]


class Starcoder2Settings(SlidingSettings):
    """Layer norms with bias, biases everywhere where `use_bias` says so, MLP without gate, a sliding window in every
    layer or none.
    """

    model_type = "starcoder2"
    models = "StarCoder2"

    num_key_value_heads: pydantic.PositiveInt | None = 2
    hidden_act: Activation = "gelu_pytorch_tanh"
    max_position_embeddings: pydantic.PositiveInt = 4096
    rms_norm_eps: pydantic.PositiveFloat = pydantic.Field(1e-5, alias="norm_epsilon")
    sliding_window: pydantic.PositiveInt | None = pydantic.Field(None, examples=[None, 5])
    use_bias: bool = True
    tie_word_embeddings: bool = True

    def decoder_config(self) -> DecoderConfig:
        """The decoder that the configuration describes."""
        return replace(
            super().decoder_config(),
            names=Names(mlp_inputs=("c_fc",), mlp_output="c_proj"),
            norm="layer",
            gated=False,
            qkv_bias=self.use_bias,
            output_bias=self.use_bias,
            mlp_bias=self.use_bias,
        )
