"""A decoder that exports well: constant RoPE tables, float16-safe norms, names as in Hugging Face's models.

Written for tracing, not for training. The cache is an argument of the forward pass, so that one decoder serves
whole sequences and, with a stateful cache, prompts and single tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edkm_export.models.rope import rope_tables

__all__ = ["Cache", "Decoder", "DecoderConfig", "RMSNorm", "WholeSequence"]

# Additive mask of a forbidden position: exp underflows to zero, and adding a score does not overflow float16.
MASKED = -3e4


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder; sizes in elements."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False


class Cache(Protocol):
    """Keys and values of earlier positions."""

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values [1, kv_heads, new, head_dim]; return those of all positions."""
        ...


class RMSNorm(nn.Module):
    """Root mean square norm that cannot overflow float16.

    The input is first divided by its largest magnitude, which the norm is invariant to: every square is then at
    most one. The floor under that magnitude keeps a zero input from dividing by zero and needs no care, since any
    positive divisor gives the same result.
    """

    FLOOR = 2.0**-10

    root_eps: Tensor

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        # A tensor, since a number divided by a tensor is converted to `inverse`, which adds an epsilon of its own.
        self.register_buffer("root_eps", torch.tensor([eps**0.5], device="cpu"), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> [..., size]."""
        largest = x.abs().amax(-1, keepdim=True) + self.FLOOR
        scaled = x / largest
        eps = (self.root_eps / largest).square()
        return scaled * torch.rsqrt(scaled.square().mean(-1, keepdim=True) + eps) * self.weight


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        hidden, width, kv_width = (
            config.hidden_size,
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
        )
        self.q_proj = nn.Linear(hidden, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, hidden, bias=config.output_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: Cache | None) -> Tensor:
        """x [1, new, hidden], cos and sin [new, head_dim], mask [1, 1, new, total] -> [1, new, hidden]."""
        queries = _rotate(self._split(self.q_proj(x), self.heads), cos, sin)
        keys = _rotate(self._split(self.k_proj(x), self.kv_heads), cos, sin)
        values = self._split(self.v_proj(x), self.kv_heads)
        if cache is not None:
            keys, values = cache.update(self.layer, keys, values)
        # No scale argument: only then does the converter emit the fused attention op.
        mixed = F.scaled_dot_product_attention(
            queries, self._repeat(keys), self._repeat(values), attn_mask=mask
        )
        batch, new = x.shape[:2]
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, new, self.heads * self.head_dim))  # type: ignore[no-any-return]

    def _split(self, x: Tensor, heads: int) -> Tensor:
        """[1, new, heads * head_dim] -> [1, heads, new, head_dim]."""
        return x.view(x.shape[0], x.shape[1], heads, self.head_dim).transpose(1, 2)

    def _repeat(self, x: Tensor) -> Tensor:
        """[1, kv_heads, total, head_dim] -> [1, heads, total, head_dim]."""
        times = self.heads // self.kv_heads
        if times == 1:
            return x
        batch, heads, total, dim = x.shape
        return (
            x.unsqueeze(2).expand(batch, heads, times, total, dim).reshape(batch, heads * times, total, dim)
        )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the "rotate half" layout. x [1, heads, new, head_dim], cos and sin [new, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class MLP(nn.Module):
    """Gated feed-forward network (SwiGLU)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> [..., hidden]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: Cache | None) -> Tensor:
        """x [1, new, hidden] -> [1, new, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Stack(nn.Module):
    """Embedding, layers and final norm: the part that Hugging Face calls `model`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self, input_ids: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: Cache | None
    ) -> Tensor:
        """input_ids [1, new] -> [1, new, hidden]."""
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, cos, sin, mask, cache)
        return self.norm(x)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """A causal language model whose parameter names are those of `LlamaForCausalLM`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Stack(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, input_ids: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: Cache | None = None
    ) -> Tensor:
        """Logits of every position.

        Args:
            input_ids: int [1, new].
            cos: float [new, head_dim].
            sin: float [new, head_dim].
            mask: float [1, 1, new, total], additive.
            cache: None: the new positions are all there are.

        Returns:
            float [1, new, vocab_size].
        """
        return self.lm_head(self.model(input_ids, cos, sin, mask, cache))  # type: ignore[no-any-return]


class WholeSequence(nn.Module):
    """A decoder over a fixed number of positions, its tables and causal mask held as constants.

    A shorter text is padded behind: positions never see what follows them.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor

    def __init__(self, decoder: Decoder, rope_config: dict[str, object], length: int) -> None:
        super().__init__()
        self.decoder = decoder
        cos, sin = rope_tables(rope_config, decoder.config.head_dim, length)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        mask = torch.full((1, 1, length, length), MASKED).triu(1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids int [1, length] -> logits [1, length, vocab_size]."""
        return self.decoder(input_ids, self.cos, self.sin, self.mask)  # type: ignore[no-any-return]
