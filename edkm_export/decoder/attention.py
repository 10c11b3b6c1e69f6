"""Grouped-query self-attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edkm_export.decoder.config import FULL, DecoderConfig
from edkm_export.decoder.context import Context
from edkm_export.decoder.norms import PlainRMSNorm, build_query_key_norm
from edkm_export.decoder.positions import table_of_queries
from edkm_export.decoder.projections import add_projections, project
from edkm_export.decoder.states import Cache

__all__ = ["Attention"]


class Attention(nn.Module):
    """Self-attention of one layer, with rotary or without positions of its own, and with keys and values of its own or
    those of an earlier layer.

    Args:
        config: of the decoder.
        layer: its number, from 0.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.kind = layer, config.layer_kinds[layer]
        sizes = config.heads_of(self.kind)
        self.heads, self.kv_heads, self.head_dim = config.num_heads, sizes.kv_heads, sizes.head_dim
        self.rotary_dim = 0 if layer in config.unrotated else config.rotary_of(self.kind)
        self.interleaved, self.names = config.rotary_interleaved, config.names
        self.source, self.lends = config.source_of(layer), layer in config.sources()
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.gates = config.attention_gate
        self.inputs = self.names.attention_inputs
        self.sizes: tuple[int, ...] = (2 * width if self.gates else width, kv_width, kv_width)
        if self.source is not None:
            self.inputs, self.sizes = self.inputs[:1], self.sizes[:1]
        elif config.values_from_keys and self.kind == FULL:
            self.inputs, self.sizes = self.inputs[:2], self.sizes[:2]
        add_projections(self, self.inputs, config.hidden_size, self.sizes, config.qkv_bias)
        self.add_module(
            self.names.attention_output, nn.Linear(width, config.hidden_size, bias=config.output_bias)
        )
        self.norms, self.norms_last = config.query_key_norm, config.query_key_norm_last
        if self.norms:
            self.add_module(self.names.query_norm, build_query_key_norm(config, self.heads, self.head_dim))
        if self.norms and self.source is None:
            self.add_module(self.names.key_norm, build_query_key_norm(config, self.kv_heads, self.head_dim))
        self.value_norm = PlainRMSNorm(config.norm_eps) if config.value_norm and self.source is None else None
        self.cap = config.attention_cap
        scale = self.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        # Queries are scaled, not scores: the fused op takes no scale, and scores could leave the range of float16.
        self.query_scale = scale * self.head_dim**0.5 if self.cap is None else scale / self.cap

    def forward(self, x: Tensor, context: Context, cache: Cache | None) -> Tensor:
        """x [batch, new, hidden] -> [batch, new, hidden]; rotary of the context [batch, 1, new, rotary_dim]."""
        queries, *others = project(self, self.inputs, self.sizes, x)
        queries, gate = self._without_gate(queries)
        queries = self._placed(queries, self.heads, self.names.query_norm, self.rotate_queries, context)
        if abs(self.query_scale - 1) > 1e-12:
            queries = queries * self.query_scale
        if self.source is None:
            keys, values = self._own(others, context, cache)
        else:
            keys, values = context.lent[self.source]
        mixed = self._attend(queries, self._repeat(keys), self._repeat(values), context.masks[self.kind])
        batch, new = x.shape[:2]
        mixed = mixed.transpose(1, 2).reshape(batch, new, self.heads * self.head_dim)
        if gate is not None:
            mixed = mixed * torch.sigmoid(gate)
        return self.get_submodule(self.names.attention_output)(mixed)  # type: ignore[no-any-return]

    def _own(
        self, projected: Sequence[Tensor], context: Context, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions, from those of the new ones."""
        keys = self._placed(projected[0], self.kv_heads, self.names.key_norm, self.rotate_keys, context)
        values = self._split(projected[-1], self.kv_heads)  # the projected keys where there are no others
        if self.value_norm is not None:
            values = self.value_norm(values)
        if cache is not None:
            keys, values = cache.update(self.layer, keys, values)
        if self.lends:
            context.lent[self.layer] = keys, values
        return keys, values

    def _placed(
        self,
        x: Tensor,
        heads: int,
        norm: str,
        rotate: Callable[[Tensor, dict[str, tuple[Tensor, Tensor]]], Tensor],
        context: Context,
    ) -> Tensor:
        """Normalized and rotated heads of projected queries or keys."""
        if self.norms in ("whole", "apart"):
            x = self.get_submodule(norm)(x)
        x = self._split(x, heads)
        if self.norms == "head" and not self.norms_last:
            x = self.get_submodule(norm)(x)
        if self.rotary_dim:
            x = rotate(x, context.rotary)
        if self.norms == "head" and self.norms_last:
            x = self.get_submodule(norm)(x)
        return x

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

    def rotate_queries(self, queries: Tensor, rotary: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """RoPE of queries [batch, heads, new, head_dim] by tables of the context, [batch, 1, new, dim]."""
        return self._turn(queries, *table_of_queries(rotary, self.kind))

    def rotate_keys(self, keys: Tensor, rotary: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """The same of keys [batch, kv_heads, new, head_dim]."""
        return self._turn(keys, *rotary[self.kind])

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
