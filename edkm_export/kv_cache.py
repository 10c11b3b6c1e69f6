"""How an artifact holds keys and values: as floats, or as int8 with a scale for each head and token.

The scale s of a head of `head_dim` numbers is their largest magnitude over 127, and a number x is held as round(x / s),
ties to even: symmetric, without a zero point, and off by s / 2 at most. A scale is made of its token and nothing else,
so that it needs no calibration, and a text is held alike whether it came at once, token by token, or in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from edkm_export.errors import ConversionError

if TYPE_CHECKING:  # importing it takes torch, which `--help` must not wait for
    from torch import Tensor

__all__ = [
    "FLOAT",
    "INT8",
    "KV_CACHES",
    "LARGEST_CODE",
    "LEAST_SCALE",
    "HeldCache",
    "HeldLayer",
    "KVCache",
    "check_kv_cache",
]

KVCache: TypeAlias = Literal["float", "int8"]
KV_CACHES: tuple[KVCache, ...] = get_args(KVCache)
FLOAT, INT8 = KV_CACHES
"""Floats are float32 or float16, as the activations of the artifact are."""

LARGEST_CODE = 127
"""Of the magnitudes of int8 that have a negative one, too."""

LEAST_SCALE = 2.0**-14
"""The smallest normal float16, so that no processor takes a scale for zero; it is that of a head below 0.008."""


@dataclass(frozen=True)
class HeldLayer:
    """Keys and values of one text in one layer, as an artifact holds them.

    Attributes:
        keys: codes, int8 [heads, tokens, head_dim].
        key_scales: float [heads, tokens, 1].
        values: as the keys.
        value_scales: as those of the keys.
    """

    keys: Tensor
    key_scales: Tensor
    values: Tensor
    value_scales: Tensor


HeldCache: TypeAlias = Sequence[HeldLayer]
"""Of all layers that keep keys and values, in their order."""


def check_kv_cache(kv_cache: str) -> KVCache:
    """The option `--kv-cache`.

    Raises:
        ConversionError: there is no such way to hold them.
    """
    for known in KV_CACHES:
        if kv_cache == known:
            return known
    raise ConversionError(f"--kv-cache {kv_cache!r} is unknown; use one of {', '.join(KV_CACHES)}.")
