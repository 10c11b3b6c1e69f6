"""Rotary position embeddings as constant tables.

Computed here in float64 and rounded once: a graph that multiplies positions by frequencies in float16 is wrong
by whole radians at position 4,000.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from edkm_export.errors import ConversionError

__all__ = ["rope_tables"]


def rope_tables(config: dict[str, Any], head_dim: int, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, as the model's configuration scales them.

    Args:
        config: Hugging Face configuration with `rope_parameters`.
        head_dim: channels of a head; the two halves of a head rotate together ("rotate half").
        length: number of positions, from 0.

    Returns:
        cos, sin: float32 [length, head_dim], with the attention factor of YaRN folded in.

    Raises:
        ConversionError: unsupported kind of scaling, or more positions than its frequencies hold for.
    """
    parameters = dict(config.get("rope_parameters") or {})
    kind = parameters.get("rope_type", "default")
    if kind not in _FREQUENCIES:
        raise ConversionError(
            f"RoPE scaling '{kind}' is not supported; supported are {', '.join(sorted(_FREQUENCIES))}."
        )
    if kind == "dynamic" and length > config["max_position_embeddings"]:
        raise ConversionError(
            f"RoPE scaling 'dynamic' changes its frequencies with the text beyond {config['max_position_embeddings']} "
            f"tokens, which constant tables cannot; use --sequence-length {config['max_position_embeddings']} or less."
        )
    base = float(parameters.get("rope_theta", config.get("rope_theta", 10000.0)))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies, factor = _FREQUENCIES[kind](base**-exponents, parameters, config, base)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)  # [length, head_dim / 2]
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


_Scaled = tuple[Tensor, float]  # frequencies float64 [head_dim / 2], factor on cos and sin


def _default(frequencies: Tensor, parameters: dict[str, Any], config: dict[str, Any], base: float) -> _Scaled:
    return frequencies, 1.0


def _linear(frequencies: Tensor, parameters: dict[str, Any], config: dict[str, Any], base: float) -> _Scaled:
    return frequencies / parameters["factor"], 1.0


def _llama3(frequencies: Tensor, parameters: dict[str, Any], config: dict[str, Any], base: float) -> _Scaled:
    """Llama 3.1: long waves are stretched by `factor`, short ones kept, those between blended."""
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / parameters["factor"]), 1.0


def _yarn(frequencies: Tensor, parameters: dict[str, Any], config: dict[str, Any], base: float) -> _Scaled:
    """YaRN, arXiv 2309.00071, sections 3.2 and 3.4."""
    original = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or config["max_position_embeddings"] / original
    half = len(frequencies)

    def channel(turns: float) -> float:
        """The channel whose wave makes so many turns over the original context."""
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(base)

    first = channel(parameters.get("beta_fast") or 32)
    last = channel(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    stretched = ((torch.arange(half, dtype=torch.float64) - first) / max(last - first, 1e-3)).clamp(0, 1)
    scaled = frequencies * (1 - stretched) + frequencies / factor * stretched

    def attention(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    given = parameters.get("attention_factor")
    if given is not None:
        return scaled, float(given)
    top, bottom = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scaled, attention(top) / attention(bottom) if top and bottom else attention(1.0)


_FREQUENCIES = {"default": _default, "dynamic": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
