"""ModernBERT: rotary positions, layers that see a window on both sides, gated MLP, norms before, no biases."""

from __future__ import annotations

import pydantic
from torch import Tensor, nn

from edkm_export.decoder.attention import Attention
from edkm_export.decoder.config import FULL, SLIDING, DecoderConfig, Names
from edkm_export.decoder.context import Context
from edkm_export.decoder.families.settings import Activation, LayerType, Settings
from edkm_export.decoder.mlp import MLP
from edkm_export.decoder.norms import LayerNorm

__all__ = ["ModernBert", "ModernBertSettings"]

_NAMES = Names(
    attention="attn", attention_inputs=("Wqkv",), attention_output="Wo", mlp_inputs=("Wi",), mlp_output="Wo"
)


class ModernBertSettings(Settings):
    """Keys of transformers' ModernBertConfig."""

    model_type = "modernbert"
    models = "ModernBERT Embed, GTE ModernBERT"

    vocab_size: pydantic.PositiveInt = 50368
    hidden_size: pydantic.PositiveInt = 768
    intermediate_size: pydantic.PositiveInt = 1152
    num_hidden_layers: pydantic.PositiveInt = 22
    num_attention_heads: pydantic.PositiveInt = 12
    hidden_activation: Activation = "gelu"
    max_position_embeddings: pydantic.PositiveInt = 8192
    norm_eps: pydantic.PositiveFloat = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    layer_types: list[LayerType] | None = None
    global_attn_every_n_layers: pydantic.PositiveInt = 3
    local_attention: pydantic.PositiveInt = 128

    def layer_kinds(self) -> tuple[str, ...]:
        """As `layer_types` says, or in a fixed pattern."""
        if self.layer_types is not None:
            return tuple(FULL if each == "full_attention" else SLIDING for each in self.layer_types)
        every = self.global_attn_every_n_layers
        return tuple(SLIDING if layer % every else FULL for layer in range(self.num_hidden_layers))

    def decoder_config(self) -> DecoderConfig:
        """Sizes and options."""
        kinds = self.layer_kinds()
        head_dim = self.hidden_size // self.num_attention_heads
        return DecoderConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_attention_heads,
            head_dim=head_dim,
            max_positions=self.max_position_embeddings,
            norm_eps=self.norm_eps,
            layer_kinds=kinds,
            # half of the window on each side, that distance included
            sliding_window=self.local_attention // 2 + 1 if SLIDING in kinds else None,
            rotary_dim=head_dim,
            norm="layer",
            norm_bias=self.norm_bias,
            activation=self.hidden_activation,
            qkv_bias=self.attention_bias,
            output_bias=self.attention_bias,
            mlp_bias=self.mlp_bias,
            bidirectional=True,
            names=_NAMES,
        )

    def body(self) -> ModernBert:
        """The model on token ids."""
        return ModernBert(self.decoder_config())


class ModernBert(nn.Module):
    """Token vectors of ModernBERT.

    Args:
        config: sizes and options.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.ModuleDict(
            {"tok_embeddings": nn.Embedding(config.vocab_size, config.hidden_size), "norm": _norm(config)}
        )
        self.layers = nn.ModuleList(_Layer(config, layer) for layer in range(config.num_layers))
        self.final_norm = _norm(config)

    def forward(self, input_ids: Tensor, context: Context, cache: None = None) -> Tensor:
        """input_ids [batch, tokens] -> [batch, tokens, hidden]."""
        x = self.embeddings["norm"](self.embeddings["tok_embeddings"](input_ids))
        for layer in self.layers:
            x = layer(x, context)
        return self.final_norm(x)  # type: ignore[no-any-return]


class _Layer(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = _norm(config) if layer else nn.Identity()  # the first reads the embeddings' norm
        self.attn = Attention(config, layer)
        self.mlp_norm = _norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [batch, tokens, hidden] -> [batch, tokens, hidden]."""
        x = x + self.attn(self.attn_norm(x), context, None)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


def _norm(config: DecoderConfig) -> LayerNorm:
    return LayerNorm(config.hidden_size, config.norm_eps, bias=config.norm_bias)
