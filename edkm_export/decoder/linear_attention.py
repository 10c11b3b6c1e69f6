"""Linear attention: the gated DeltaNet of Qwen3-Next and Qwen3.5."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edkm_export.decoder.config import DecoderConfig, LinearAttention
from edkm_export.decoder.context import Context
from edkm_export.decoder.delta_rule import CHUNK, Triangle, chunked_delta_rule, delta_step
from edkm_export.decoder.norms import RMSNorm
from edkm_export.decoder.projections import linears
from edkm_export.decoder.short_convolution import along_text, depthwise
from edkm_export.decoder.states import Cache

__all__ = ["NORM_EPS", "GatedDeltaNet", "Rule", "decays"]

NORM_EPS = 1e-6
"""Added to the squared length of queries and keys."""


class GatedDeltaNet(nn.Module):
    """A layer's linear attention: convolved projections, the gated delta rule, and a gated norm of its output.

    Args:
        config: of the decoder.
        layer: its number, from 0.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        assert config.linear is not None
        sizes = config.linear
        self.layer, self.sizes = layer, sizes
        hidden, width = config.hidden_size, sizes.value_heads * sizes.value_dim
        self.in_proj_qkv = nn.Linear(hidden, sizes.channels, bias=False)
        self.in_proj_z = nn.Linear(hidden, width, bias=False)
        self.in_proj_b = nn.Linear(hidden, sizes.value_heads, bias=False)
        self.in_proj_a = nn.Linear(hidden, sizes.value_heads, bias=False)
        self.conv1d = depthwise(sizes.channels, config.kernel_size, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(sizes.value_heads))
        self.A_log = nn.Parameter(torch.zeros(sizes.value_heads))
        self.rule = Rule(sizes, config.max_positions)
        self.norm = RMSNorm(sizes.value_dim, config.norm_eps)
        self.out_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor, context: Context, cache: Cache | None) -> Tensor:
        """x [batch, new, hidden] -> [batch, new, hidden]."""
        mixed, gate = linears(x, [self.in_proj_qkv, self.in_proj_z])
        strength, fading = linears(x, [self.in_proj_b, self.in_proj_a])
        if context.real is not None:
            mixed = mixed * context.real
        mixed = F.silu(along_text(self.conv1d, mixed.transpose(1, 2), self.layer, cache)).transpose(1, 2)
        before = None if cache is None else cache.matrices(self.layer)
        outputs, after = self.rule(mixed, strength, fading, self.A_log, self.dt_bias, before, context)
        if cache is not None:
            cache.keep(self.layer, after)
        batch, new = x.shape[:2]
        outputs = outputs.to(x.dtype)  # [batch, new, value_heads, value_dim]
        heads, dim = self.sizes.value_heads, self.sizes.value_dim
        normed = self.norm(outputs).reshape(batch, new, heads * dim)
        return self.out_proj(normed * F.silu(gate))  # type: ignore[no-any-return]


class Rule(nn.Module):
    """The gated delta rule from projections to outputs, in float32 throughout.

    A decay next to one decides how much a head remembers after a thousand tokens, and float16 has no number between
    0.9995 and one: rounded, a memory of a thousand tokens lasts for ever or for half as long. Squares of queries and
    keys, whose lengths are taken, may leave float16 as well. It has no parameters of its own; formats may put another
    form in its place.

    Args:
        sizes: of the layer.
        longest: most tokens of one call, for traces that leave their number open.
    """

    def __init__(self, sizes: LinearAttention, longest: int) -> None:
        super().__init__()
        self.sizes, self.longest = sizes, longest

    def forward(
        self,
        mixed: Tensor,
        strength: Tensor,
        fading: Tensor,
        a_log: Tensor,
        dt_bias: Tensor,
        before: Tensor | None,
        context: Context,
    ) -> tuple[Tensor, Tensor]:
        """Run the rule.

        Args:
            mixed: queries, keys and values side by side, [batch, new, channels].
            strength: before its sigmoid, [batch, new, value_heads].
            fading: what the decay is made of, [batch, new, value_heads].
            a_log: parameter of the decay, [value_heads].
            dt_bias: as `a_log`.
            before: float32 [batch, value_heads, key_dim, value_dim]; None: zero.
            context: of the tokens.

        Returns:
            Outputs float32 [batch, new, value_heads, value_dim], and the matrices after the tokens.
        """
        tokens = self.operands(mixed, strength, fading, a_log, dt_bias, context)
        triangle = self._triangle(mixed.shape[1]) if context.triangle is None else context.triangle
        if before is not None and triangle.tokens == 1 and mixed.shape[1] == 1:
            outputs, after = delta_step(*tokens, before)
        else:
            outputs, after = chunked_delta_rule(*tokens, before, triangle)
        return outputs.transpose(1, 2), after

    def operands(
        self,
        mixed: Tensor,
        strength: Tensor,
        fading: Tensor,
        a_log: Tensor,
        dt_bias: Tensor,
        context: Context,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values, decay and strength as `delta_step` takes them, with tokens on the third axis."""
        queries, keys, values = self.heads(_wide(mixed))
        decay, strength = decays(_wide(fading), _wide(a_log), _wide(dt_bias)), _wide(strength).sigmoid()
        if context.real is not None:  # padding neither fades nor writes
            real = _wide(context.real)
            decay, strength = decay * real, strength * real
        decay, strength = decay.transpose(1, 2).unsqueeze(-1), strength.transpose(1, 2).unsqueeze(-1)
        return queries, keys, values, decay, strength

    def heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys of one length, values: [batch, new, channels] -> [batch, value_heads, new, dim] each."""
        sizes = self.sizes
        width = sizes.key_heads * sizes.key_dim
        queries, keys, values = mixed.split(  # type: ignore[no-untyped-call]
            [width, width, sizes.value_heads * sizes.value_dim], dim=-1
        )
        return (  # queries have the factor that scores of attention have
            self._split(queries, sizes.key_heads, sizes.key_dim, sizes.key_dim**-0.5),
            self._split(keys, sizes.key_heads, sizes.key_dim, 1.0),
            self._split(values, sizes.value_heads, sizes.value_dim, None),
        )

    def _split(self, x: Tensor, heads: int, dim: int, length: float | None) -> Tensor:
        """[batch, new, heads * dim] -> [batch, value_heads, new, dim], of a length where one is given."""
        batch, new = x.shape[:2]
        x = x.reshape(batch, new, heads, dim)
        if length is not None:
            x = x * (torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS) * length)
        times = self.sizes.value_heads // heads
        if times > 1:
            x = x.unsqueeze(3).expand(batch, new, heads, times, dim).reshape(batch, new, heads * times, dim)
        return x.transpose(1, 2)

    def _triangle(self, new: int) -> Triangle:
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return Triangle.open(new, self.longest)
        return Triangle.of(min(new, CHUNK))


def _wide(x: Tensor) -> Tensor:
    """In float32; a cast that does nothing would be folded into a parameter, which could then not be read back."""
    return x if x.dtype == torch.float32 else x.float()


def decays(fading: Tensor, a_log: Tensor, dt_bias: Tensor) -> Tensor:
    """Logarithms of the decays, [batch, new, value_heads], not above zero.

    The sum with zero keeps converters from folding the exponential of the parameter, which could then not be read back.
    """
    return -(a_log + fading * 0).exp() * F.softplus(fading + dt_bias)
