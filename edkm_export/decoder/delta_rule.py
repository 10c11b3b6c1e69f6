"""The gated delta rule: a recurrence that fades, and that writes a value only as far as it does not hold it yet.

For each head, with a matrix S, and query q, key k, value v, decay e^g (g <= 0) and strength b of a token
(Gated Delta Networks, arXiv 2412.06464, section 3.1):

    S <- e^g S;  S <- S + k (b (v - S^T k))^T;  output S^T q

A chunk of tokens takes a few matrix products instead of one step each (section 3.3): what a token writes depends on
what those before it in the chunk wrote, through a triangular system. Its inverse is built from blocks of two, four,
eight, ... tokens: a sum of powers would need no masks, but where keys repeat the powers are astronomic and cancel.
Nothing is divided by a product of decays, which may have underflowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CHUNK", "Triangle", "TriangleBuffers", "chunked_delta_rule", "delta_step"]

CHUNK = 64
"""Tokens that are taken together."""


@dataclass(frozen=True)
class Triangle:
    """Masks of a chunk, float32.

    Attributes:
        lower: [tokens, tokens], one where the column is not after the row.
        unit: [tokens, tokens], the identity.
        blocks: for each level [tokens, tokens], one where, in a block of 2 ** (level + 1) tokens, the row is in the
            second half and the column in the first.
        tokens: of a chunk; None: all tokens of a call are one.
    """

    lower: Tensor
    unit: Tensor
    blocks: tuple[Tensor, ...]
    tokens: int | None

    @classmethod
    def of(cls, tokens: int) -> Triangle:
        """The masks of chunks of fixed size, which need not divide the text."""
        return cls._over(torch.arange(tokens), max(tokens - 1, 0).bit_length(), tokens)

    @classmethod
    def open(cls, tokens: int, longest: int) -> Triangle:
        """The masks of one chunk of a size that a trace leaves open.

        Args:
            tokens: of the call, as the trace knows it.
            longest: most tokens of a call.
        """
        return cls._over(torch.arange(tokens), max(longest - 1, 0).bit_length(), None)

    @classmethod
    def _over(cls, places: Tensor, levels: int, tokens: int | None) -> Triangle:
        rows, columns = places[:, None], places[None, :]
        blocks = []
        for level in range(levels):
            row, column = rows // 2**level, columns // 2**level  # halves of blocks
            blocks.append(((row == column + 1) & (row // 2 == column // 2)).float())
        lower, unit = (columns <= rows).float(), (columns == rows).float()
        return cls(lower, unit, tuple(blocks), tokens)


class TriangleBuffers(nn.Module):
    """The masks of chunks of fixed size as constants that all layers share.

    Args:
        tokens: of a chunk.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        masks = Triangle.of(tokens)
        self.levels = len(masks.blocks)
        if tokens > 1:
            self.register_buffer("lower", masks.lower, persistent=False)
            self.register_buffer("unit", masks.unit, persistent=False)
        for level, block in enumerate(masks.blocks):
            self.register_buffer(f"block_{level}", block, persistent=False)

    def masks(self) -> Triangle:
        """The masks."""
        if self.tokens == 1:  # no mask is needed
            return Triangle.of(1)
        blocks = tuple(self.get_buffer(f"block_{level}") for level in range(self.levels))
        return Triangle(self.get_buffer("lower"), self.get_buffer("unit"), blocks, self.tokens)


def delta_step(
    queries: Tensor, keys: Tensor, values: Tensor, decay: Tensor, strength: Tensor, matrices: Tensor
) -> tuple[Tensor, Tensor]:
    """One token.

    Args:
        queries: float32 [batch, heads, 1, key_dim].
        keys: as the queries.
        values: float32 [batch, heads, 1, value_dim].
        decay: logarithm of the decay, float32 [batch, heads, 1, 1].
        strength: 0 to 1, float32 [batch, heads, 1, 1].
        matrices: before it, float32 [batch, heads, key_dim, value_dim].

    Returns:
        Outputs [batch, heads, 1, value_dim], and the matrices after it.
    """
    matrices = matrices * decay.exp()
    written = (values - keys @ matrices) * strength
    matrices = matrices + keys.transpose(-1, -2) @ written
    return queries @ matrices, matrices


def chunked_delta_rule(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    decay: Tensor,
    strength: Tensor,
    matrices: Tensor | None,
    triangle: Triangle,
) -> tuple[Tensor, Tensor]:
    """Any number of tokens, a chunk at a time.

    Arguments and results are those of `delta_step`, with tokens on the third axis; without matrices the first token is
    that of a text.
    """
    size = triangle.tokens
    if size is None:
        return _chunk(queries, keys, values, decay, strength, matrices, triangle)
    tokens = int(queries.shape[2])  # fixed with the size of the chunks, in a trace too
    missing = -tokens % size
    if missing:  # what is added neither fades nor writes
        queries, keys, values, decay, strength = (
            F.pad(each, (0, 0, 0, missing)) for each in (queries, keys, values, decay, strength)
        )
    parts = []
    pieces: Any = (each.split(size, 2) for each in (queries, keys, values, decay, strength))  # type: ignore[no-untyped-call]
    for query, key, value, fade, amount in zip(*pieces, strict=True):
        outputs, matrices = _chunk(query, key, value, fade, amount, matrices, triangle)
        parts.append(outputs)
    assert matrices is not None, "no tokens"
    outputs = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    return outputs[:, :, :tokens] if missing else outputs, matrices


def _chunk(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    decay: Tensor,
    strength: Tensor,
    matrices: Tensor | None,
    triangle: Triangle,
) -> tuple[Tensor, Tensor]:
    total = triangle.lower @ decay  # [batch, heads, tokens, 1], of the chunk up to each token
    # Where the column is after the row the difference is positive, and is masked away after all.
    fading = (total - total.transpose(-1, -2)).clamp(max=0).exp() * triangle.lower
    turned = keys.transpose(-1, -2)
    inverse = _inverse((keys * strength) @ turned * fading, triangle)
    written = values * strength
    since = total.exp()  # what is left at each token of what was there before the chunk
    if matrices is not None:
        written = written - (keys * strength * since) @ matrices
    written = inverse @ written
    outputs = (queries @ turned * fading) @ written
    last = total[:, :, -1:]
    after = (keys * (last - total).exp()).transpose(-1, -2) @ written
    if matrices is not None:
        outputs = (queries * since) @ matrices + outputs
        after = matrices * last.exp() + after
    return outputs, after


def _inverse(system: Tensor, triangle: Triangle) -> Tensor:
    """Inverse of the identity plus what lies below the diagonal of a system [..., tokens, tokens]."""
    inverse = triangle.unit
    for level, block in enumerate(triangle.blocks):
        across = system * block
        inverse = inverse - across if level == 0 else inverse - inverse @ across @ inverse
    return inverse
