"""Rotary position embeddings as constant tables.

Computed here in float64 and rounded once: a graph that multiplies positions by frequencies in float16 is wrong
by whole radians at position 4,000.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from edkm_export.decoder.config import FULL, SLIDING
from edkm_export.errors import ConversionError

__all__ = ["rope_tables"]

_MOST_VALUES = 1 << 27  # of a table: 512 MB in float32, a million positions of 128 channels
_LAYER_TYPES = {FULL: "full_attention", SLIDING: "sliding_attention"}


def rope_tables(
    config: dict[str, Any],
    rotary_dim: int,
    length: int,
    layer_kind: str = FULL,
    *,
    interleaved: bool = False,
    alpha: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, as the model's configuration scales them.

    Args:
        config: Hugging Face configuration with `rope_parameters`.
        rotary_dim: channels of a head that rotate.
        length: number of positions, from 0.
        layer_kind: FULL or SLIDING; some models have parameters for each.
        interleaved: pairs of neighbouring channels share an angle, instead of the two halves.
        alpha: the base is stretched by it, to the power of rotary_dim / (rotary_dim - 2); None: as the kind says.

    Returns:
        cos, sin: float32 [length, rotary_dim], with the attention factor of YaRN or LongRoPE folded in.

    Raises:
        ConversionError: unsupported kind of scaling, or more positions than its frequencies hold for.
    """
    parameters = _Parameters(config, layer_kind)
    kind = parameters.kind if alpha is None else "default"
    if kind not in _FREQUENCIES:
        raise ConversionError(
            f"RoPE scaling {kind!r} is not supported; supported are {', '.join(sorted(_FREQUENCIES))}."
        )
    if kind == "dynamic" and length > parameters.max_positions:
        raise ConversionError(
            f"RoPE scaling 'dynamic' changes its frequencies with the text beyond {parameters.max_positions} "
            f"tokens, which constant tables cannot; use --sequence-length {parameters.max_positions} or less."
        )
    if kind == "longrope" and length > parameters.number("original_max_position_embeddings"):
        limit = int(parameters.number("original_max_position_embeddings"))
        raise ConversionError(
            f"RoPE scaling 'longrope' has other frequencies for texts beyond {limit} tokens, also for their first "
            f"tokens, which constant tables cannot; use --sequence-length {limit} or less."
        )
    if length * rotary_dim > _MOST_VALUES:
        raise ConversionError(
            f"tables of {length:,} positions take {length * rotary_dim * 4 / 1e9:.1f} GB; ask for fewer with "
            "--sequence-length or --context-length."
        )
    base = parameters.number("rope_theta", 10000.0)
    if alpha is not None:
        base *= alpha ** (rotary_dim / (rotary_dim - 2))
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    frequencies, factor = _FREQUENCIES[kind](base**-exponents, parameters, base)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)  # [length, rotary_dim / 2]
    angles = angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angles, angles), dim=-1)
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


class _Parameters:
    """`rope_parameters` of a configuration; each number is checked when it is asked for."""

    def __init__(self, config: dict[str, Any], layer_kind: str) -> None:
        given = config.get("rope_parameters") or {}
        self._outer = given if isinstance(given, dict) else {}
        if isinstance(given, dict) and any(name in given for name in _LAYER_TYPES.values()):
            given = given.get(_LAYER_TYPES[layer_kind])
        if not isinstance(given, dict):
            raise ConversionError(
                f"rope_parameters is {given!r}, expected a dict; palettize the model again."
            )
        self.kind = given.get("rope_type", "default")
        self.max_positions: int = config.get("max_position_embeddings", 2048)
        self._values = {"rope_theta": config.get("rope_theta"), **given}

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number, which must be there unless there is a default."""
        value = self._values.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ConversionError(
                f"RoPE scaling {self.kind!r}: {name} is {value!r}, expected a positive number."
            )
        return float(value)

    def factors(self, name: str, count: int) -> Tensor:
        """A list of positive numbers, float64 [count]."""
        values = self._values.get(name)
        if (
            not isinstance(values, list)
            or len(values) != count
            or not all(type(value) in (int, float) and 0 < value < math.inf for value in values)
        ):
            shown = f"{len(values)} values" if isinstance(values, list) else repr(values)
            raise ConversionError(
                f"RoPE scaling {self.kind!r}: {name} is {shown}, expected {count} positive numbers."
            )
        return torch.tensor(values, dtype=torch.float64)

    def has(self, name: str) -> bool:
        """True when it is given."""
        return self._values.get(name) is not None

    def switched(self, name: str) -> bool:
        """True when it is given and not 0, which transformers takes for not given."""
        return self.has(name) and self._values[name] != 0

    @property
    def truncated(self) -> bool:
        """YaRN rounds the borders of its ramp unless told otherwise; transformers asks beside the kinds of layers."""
        return bool(self._outer.get("truncate", True))


_Scaled = tuple[Tensor, float]  # frequencies float64 [rotary_dim / 2], factor on cos and sin


def _default(frequencies: Tensor, parameters: _Parameters, base: float) -> _Scaled:
    return frequencies, 1.0


def _linear(frequencies: Tensor, parameters: _Parameters, base: float) -> _Scaled:
    return frequencies / parameters.number("factor"), 1.0


def _llama3(frequencies: Tensor, parameters: _Parameters, base: float) -> _Scaled:
    """Llama 3.1: long waves are stretched by `factor`, short ones kept, those between blended."""
    turns = parameters.number("original_max_position_embeddings") * frequencies / (2 * math.pi)
    low, high = parameters.number("low_freq_factor"), parameters.number("high_freq_factor")
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / parameters.number("factor")), 1.0


def _yarn(frequencies: Tensor, parameters: _Parameters, base: float) -> _Scaled:
    """YaRN, arXiv 2309.00071, sections 3.2 and 3.4."""
    original = parameters.number("original_max_position_embeddings")
    factor = parameters.number("factor", parameters.max_positions / original)
    half = len(frequencies)

    def channel(turns: float) -> float:
        """The channel whose wave makes so many turns over the original context."""
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(base)

    first, last = (
        channel(parameters.number(name, turns) if parameters.switched(name) else turns)
        for name, turns in (("beta_fast", 32.0), ("beta_slow", 1.0))
    )
    if parameters.truncated:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    stretched = ((torch.arange(half, dtype=torch.float64) - first) / max(last - first, 1e-3)).clamp(0, 1)
    scaled = frequencies * (1 - stretched) + frequencies / factor * stretched

    def attention(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if parameters.has("attention_factor"):
        return scaled, parameters.number("attention_factor")
    if parameters.switched("mscale") and parameters.switched("mscale_all_dim"):
        ratio = attention(parameters.number("mscale")) / attention(parameters.number("mscale_all_dim"))
        return scaled, ratio
    return scaled, attention(1.0)


def _longrope(frequencies: Tensor, parameters: _Parameters, base: float) -> _Scaled:
    """LongRoPE, arXiv 2402.13753, within the context of the pretraining; Phi-3 gives the factors."""
    original = parameters.number("original_max_position_embeddings")
    factor = parameters.number("factor", parameters.max_positions / original)
    attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    scaled = frequencies / parameters.factors("short_factor", len(frequencies))
    return scaled, parameters.number("attention_factor", attention)


def _proportional(frequencies: Tensor, parameters: _Parameters, base: float) -> _Scaled:
    """Gemma 4's: the fastest frequencies of a whole head, and none in the other channels, which do not rotate."""
    part = parameters.number("partial_rotary_factor", 1.0)
    if part > 1:
        raise ConversionError(
            f"RoPE scaling 'proportional': partial_rotary_factor is {part!r}, expected more than 0 and at most 1."
        )
    half = len(frequencies)
    turning = int(part * 2 * half // 2)
    kept = torch.cat((frequencies[:turning], torch.zeros(half - turning, dtype=torch.float64)))
    return kept / parameters.number("factor", 1.0), 1.0


_FREQUENCIES = {
    "default": _default,
    "dynamic": _default,
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _longrope,
    "proportional": _proportional,
    "yarn": _yarn,
}
