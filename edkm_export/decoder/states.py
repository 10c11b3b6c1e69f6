"""The state of a layer: what it keeps of the text so far.

Attention keeps keys and values of every position, and a sliding layer looks at the last of them; their state grows. A
convolution keeps its last inputs, and a recurrence one matrix a head: their size does not depend on the text, and what
entered them cannot be taken out again. Each format holds the three in its own way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

from edkm_export.decoder.config import ATTENDS, CONVOLUTION, LINEAR, DecoderConfig
from edkm_export.kv_cache import INT8, KVCache

__all__ = [
    "Cache",
    "Columns",
    "KeysValues",
    "LayerState",
    "Recurrence",
    "cache_bytes_per_token",
    "layer_states",
    "layers_with",
]


@dataclass(frozen=True)
class KeysValues:
    """Keys and values, each [batch, heads, positions, head_dim]."""

    heads: int
    head_dim: int


@dataclass(frozen=True)
class Columns:
    """The last inputs of a convolution along the text, [batch, channels, width], zero before its first token.

    `width` is the size of the kernel, as transformers and transformers.js hold it; the oldest column is not read.
    """

    channels: int
    width: int


@dataclass(frozen=True)
class Recurrence:
    """A matrix for each head, [batch, heads, key_dim, value_dim], zero before the first token; float32 always.

    In float16 a head that forgets slowly would drop what is less than a 2,000th of what it holds.
    """

    heads: int
    key_dim: int
    value_dim: int


LayerState: TypeAlias = "KeysValues | Columns | Recurrence"


def layer_states(config: DecoderConfig, layer: int) -> tuple[LayerState, ...]:
    """What a layer keeps; nothing when it attends with the keys and values of another one.

    Args:
        config: of the decoder.
        layer: its number, from 0.
    """
    kind = config.layer_kinds[layer]
    if kind in ATTENDS:
        if config.source_of(layer) is not None:
            return ()
        sizes = config.heads_of(kind)
        return (KeysValues(sizes.kv_heads, sizes.head_dim),)
    if kind == CONVOLUTION:
        return (Columns(config.hidden_size, config.kernel_size),)
    assert kind == LINEAR and config.linear is not None, kind
    linear = config.linear
    return (
        Columns(linear.channels, config.kernel_size),
        Recurrence(linear.value_heads, linear.key_dim, linear.value_dim),
    )


def layers_with(config: DecoderConfig, kind: type, layers: slice = slice(None)) -> list[int]:
    """Numbers of the layers that keep a state of a kind.

    Args:
        config: of the decoder.
        kind: one of `KeysValues`, `Columns`, `Recurrence`.
        layers: among these; the default: all.
    """
    chosen = range(config.num_layers)[layers]
    return [
        layer for layer in chosen if any(isinstance(state, kind) for state in layer_states(config, layer))
    ]


def cache_bytes_per_token(
    config: DecoderConfig, kv_cache: KVCache, float_bytes: int, *, even: bool = False
) -> int:
    """What keys and values of one token take in all layers, with the scales of int8.

    Args:
        config: of the decoder.
        kv_cache: how they are held.
        float_bytes: of a float of theirs: 4 or 2.
        even: each layer takes as much as the largest, where all share a state.
    """
    states = [state for layer in range(config.num_layers) for state in layer_states(config, layer)]
    kept = [state for state in states if isinstance(state, KeysValues)]
    if even and kept:
        kept = [KeysValues(max(one.heads for one in kept), max(one.head_dim for one in kept))] * len(kept)
    if kv_cache == INT8:
        return sum(2 * one.heads * (one.head_dim + float_bytes) for one in kept)
    return sum(2 * one.heads * one.head_dim * float_bytes for one in kept)


class Cache(Protocol):
    """The states of all layers, during one forward pass.

    Each is read and brought up to date in one call. Padding on the left leaves no trace: its columns are zero, and it
    neither fades nor writes a recurrence. A format whose calls are padded on the right knows how many tokens are real.
    """

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values [batch, heads, new, head_dim]; return those of all positions (total)."""
        ...

    def extend(self, layer: int, columns: Tensor) -> Tensor:
        """Store the last of new columns [batch, channels, new]; return them after the kept ones, [..., width + new]."""
        ...

    def matrices(self, layer: int) -> Tensor:
        """The recurrence so far, float32 [batch, heads, key_dim, value_dim]."""
        ...

    def keep(self, layer: int, matrices: Tensor) -> None:
        """Store the recurrence after the new tokens, as `matrices`."""
        ...
