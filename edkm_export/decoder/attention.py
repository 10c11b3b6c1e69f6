"""Grouped-query self-attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edkm_export.decoder.config import DecoderConfig
from edkm_export.decoder.context import Context
from edkm_export.decoder.norms import build_query_key_norm
from edkm_export.decoder.positions import table_of_queries
from edkm_export.decoder.projections import add_projections, project
from edkm_export.decoder.states import Cache

__all__ = ["Attention"]


class Attention(nn.Module):
    """Self-attention of one layer, with rotary or without positions of its own.

    Args:
        config: of the decoder.
        layer: its number, from 0.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.kind = layer, config.layer_kinds[layer]
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.rotary_dim = 0 if layer in config.unrotated else config.rotary_dim
        self.interleaved, self.names = config.rotary_interleaved, config.names
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.gates = config.attention_gate
        self.sizes = (2 * width if self.gates else width, kv_width, kv_width)
        add_projections(self, self.names.attention_inputs, config.hidden_size, self.sizes, config.qkv_bias)
        self.add_module(
            self.names.attention_output, nn.Linear(width, config.hidden_size, bias=config.output_bias)
        )
        self.norms, self.norms_last = config.query_key_norm, config.query_key_norm_last
        if self.norms:
            self.add_module(self.names.query_norm, build_query_key_norm(config, self.heads))
            self.add_module(self.names.key_norm, build_query_key_norm(config, self.kv_heads))
        self.cap = config.attention_cap
        scale = self.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        # Queries are scaled, not scores: the fused op takes no scale, and scores could leave the range of float16.
        self.query_scale = scale * self.head_dim**0.5 if self.cap is None else scale / self.cap

    def forward(self, x: Tensor, context: Context, cache: Cache | None) -> Tensor:
        """x [batch, new, hidden] -> [batch, new, hidden]; rotary of the context [batch, 1, new, rotary_dim]."""
        queries, keys, values = project(self, self.names.attention_inputs, self.sizes, x)
        queries, gate = self._without_gate(queries)
        if self.norms in ("whole", "apart"):
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        queries, keys = self._split(queries, self.heads), self._split(keys, self.kv_heads)
        values = self._split(values, self.kv_heads)
        if self.norms == "head" and not self.norms_last:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        if self.rotary_dim:
            queries, keys = self.rotate(queries, keys, context.rotary)
        if self.norms == "head" and self.norms_last:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        if abs(self.query_scale - 1) > 1e-12:
            queries = queries * self.query_scale
        if cache is not None:
            keys, values = cache.update(self.layer, keys, values)
        mixed = self._attend(queries, self._repeat(keys), self._repeat(values), context.masks[self.kind])
        batch, new = x.shape[:2]
        mixed = mixed.transpose(1, 2).reshape(batch, new, self.heads * self.head_dim)
        if gate is not None:
            mixed = mixed * torch.sigmoid(gate)
        return self.get_submodule(self.names.attention_output)(mixed)  # type: ignore[no-any-return]

    @property
    def query_norm(self) -> nn.Module:
        """Of queries, in families that have it."""
        return self.get_submodule(self.names.query_norm)

    @property
    def key_norm(self) -> nn.Module:
        """Of keys, in families that have it."""
        return self.get_submodule(self.names.key_norm)

    def _without_gate(self, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries, and the gate [batch, new, heads * head_dim] that stands behind the queries of each head."""
        if not self.gates:
            return queries, None
        batch, new = queries.shape[:2]
        pairs = queries.reshape(batch, new, self.heads, 2 * self.head_dim)
        queries, gate = pairs.chunk(2, dim=-1)
        width = self.heads * self.head_dim
        return queries.reshape(batch, new, width), gate.reshape(batch, new, width)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Queries [batch, heads, new, head_dim], the others [batch, heads, total, head_dim] -> as queries."""
        if self.cap is None:
            # No scale argument: only then does the Core ML converter emit the fused attention op.
            return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        scores = torch.tanh(queries @ keys.transpose(-1, -2)) * self.cap + mask
        return scores.softmax(-1) @ values

    def _split(self, x: Tensor, heads: int) -> Tensor:
        """[batch, new, heads * head_dim] -> [batch, heads, new, head_dim]."""
        return x.reshape(x.shape[0], x.shape[1], heads, self.head_dim).transpose(1, 2)

    def _repeat(self, x: Tensor) -> Tensor:
        """[batch, kv_heads, total, head_dim] -> [batch, heads, total, head_dim]."""
        times = self.heads // self.kv_heads
        if times == 1:
            return x
        batch, heads, total, dim = x.shape
        return (
            x.unsqueeze(2).expand(batch, heads, times, total, dim).reshape(batch, heads * times, total, dim)
        )

    def rotate(
        self, queries: Tensor, keys: Tensor, rotary: dict[str, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """RoPE of queries and keys [batch, heads, new, head_dim] by tables of the context, [batch, 1, new, dim]."""
        return self._turn(queries, *table_of_queries(rotary, self.kind)), self._turn(keys, *rotary[self.kind])

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.rotary_dim == self.head_dim:
            return x * cos + self._quarter_turn(x) * sin
        turned, kept = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        return torch.cat((turned * cos + self._quarter_turn(turned) * sin, kept), dim=-1)

    def _quarter_turn(self, x: Tensor) -> Tensor:
        """Pairs (a, b) -> (-b, a): the two halves of the channels as in GPT-NeoX, or neighbours as in GPT-J."""
        if not self.interleaved:
            first, second = x.chunk(2, dim=-1)
            return torch.cat((-second, first), dim=-1)
        outer = x.shape[:3]
        first, second = x.reshape(*outer, self.rotary_dim // 2, 2).chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1).reshape(*outer, self.rotary_dim)
