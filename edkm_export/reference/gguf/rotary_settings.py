"""How a GGUF file says that positions rotate, as `rope_parameters` of transformers.

llama.cpp turns channel pair i by position * scale * base**(-2i/n) / factor_i, and multiplies cosines and sines by an
attention factor. transformers' `longrope` can say any of that, pair by pair, so what none of its named kinds says
exactly is written as `longrope` with equal short and long factors, which then hold for every length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edkm_export.errors import SourceError
from edkm_export.reference.gguf.gguf_file import StoredTensor
from edkm_export.reference.gguf.gguf_settings import GgufSettings

__all__ = ["FREQUENCIES", "LONG", "SHORT", "Rotary", "llama3_factors", "rotary"]

FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
"""Tensors that hold a factor for each pair of channels."""

# What every Llama 3.x says beside its factor; the file holds only what follows from them.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_SAME_FACTORS = 1e-6  # relative; a few roundings of float32
# Values that llama.cpp gives these settings, which it reads for few architectures.
_YARN_DEFAULTS = {"yarn_ext_factor": 1.0, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0}


@dataclass(frozen=True)
class Rotary:
    """Rotation of queries and keys.

    Attributes:
        parameters: `rope_parameters` of the configuration.
        tensors: names of the tensors that went into them.
        dimensions: channels of a head that rotate.
    """

    parameters: dict[str, Any]
    tensors: tuple[str, ...]
    dimensions: int


def rotary(
    settings: GgufSettings,
    tensors: Mapping[str, StoredTensor],
    *,
    head_dim: int,
    context: int,
    log_multiplier: bool = False,
) -> Rotary:
    """Read the keys under `rope.` and the tensors of factors.

    Args:
        settings: the file's keys.
        tensors: the file's tensors.
        head_dim: channels of a head.
        context: length that the model was made for, in tokens.
        log_multiplier: the architecture knows `rope.scaling.yarn_log_multiplier`.

    Raises:
        SourceError: a value that makes no sense.
    """
    base = settings.positive("rope.freq_base", 10000.0)
    if base <= 1:
        settings.refuse("rope.freq_base", f"{base} is not above 1")
    dimensions = settings.integer("rope.dimension_count", head_dim, low=2)
    if dimensions > head_dim or dimensions % 2:
        settings.refuse("rope.dimension_count", f"{dimensions} is not an even part of a head of {head_dim}")
        dimensions = head_dim
    settings.ignore("rope.scaling.finetuned", "a note about the training")
    scaling = _Scaling(settings, context)
    found = [name for name in (FREQUENCIES, LONG, SHORT) if name in tensors]
    pairs = {name: _factors(settings, tensors[name], dimensions // 2) for name in found}
    parameters = scaling.parameters(pairs, dimensions, base, log_multiplier)
    parameters["rope_theta"] = base
    if dimensions != head_dim:
        parameters["partial_rotary_factor"] = dimensions / head_dim
        if int(head_dim * parameters["partial_rotary_factor"]) != dimensions:
            settings.refuse("rope.dimension_count", f"{dimensions} of {head_dim} is no fraction in float64")
    return Rotary(parameters, tuple(found), dimensions)


def _factors(settings: GgufSettings, tensor: StoredTensor, count: int) -> NDArray[np.float32]:
    if tensor.kind != "F32" or tensor.shape != (count,):
        raise SourceError(
            f"{settings.path}: {tensor.name} is {tensor.kind} {list(tensor.shape)}, expected F32 [{count}]."
        )
    values: NDArray[np.float32] = tensor.values(0, 1)[0]
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise SourceError(f"{settings.path}: {tensor.name} holds a factor that is not above zero.")
    return values


def llama3_factors(factor: float, dimensions: int, base: float) -> NDArray[np.float32]:
    """Factors of Llama 3.x: long waves are stretched by `factor`, short ones kept, those between blended.

    Returns:
        float32 [dimensions / 2].
    """
    # In float32 throughout, as the factors were made: they lose digits where blending begins.
    single = np.float32
    one, length = single(1), single(_LLAMA3["original_max_position_embeddings"])
    low, high = single(_LLAMA3["low_freq_factor"]), single(_LLAMA3["high_freq_factor"])
    exponents = np.arange(0, dimensions, 2, dtype=single) / single(dimensions)
    waves = single(2 * math.pi) / (one / single(base) ** exponents)
    kept = np.clip((length / waves - low) / (high - low), single(0), one)
    return np.asarray(one / ((one - kept) / single(factor) + kept), single)


class _Scaling:
    """The keys under `rope.scaling.`."""

    def __init__(self, settings: GgufSettings, context: int) -> None:
        self.settings, self.context = settings, context
        self.kind = settings.text("rope.scaling.type", "linear")
        self.factor = settings.positive("rope.scaling.factor", None)
        if self.factor is None:
            self.factor = settings.positive("rope.scale_linear", None)
        self.attention = settings.positive("rope.scaling.attn_factor", 1.0)
        self.original = settings.integer("rope.scaling.original_context_length", context, low=1)

    def parameters(
        self, pairs: Mapping[str, NDArray[np.float32]], dimensions: int, base: float, log_multiplier: bool
    ) -> dict[str, Any]:
        """`rope_parameters` without base and rotating part."""
        settings = self.settings
        if self.kind not in ("none", "linear", "yarn", "longrope"):
            settings.refuse("rope.scaling.type", f"{self.kind!r} is not known")
            return {"rope_type": "default"}
        if self.kind == "none" and (self.factor or 1.0) != 1.0:
            settings.refuse(
                "rope.scaling.factor", "rope.scaling.type is 'none', which leaves no place for it"
            )
        if self.kind == "yarn":
            return self._yarn(pairs, dimensions, base, log_multiplier)
        for name in (*_YARN_DEFAULTS, "yarn_attn_factor", "yarn_log_multiplier"):
            settings.ignore(f"rope.scaling.{name}", "the scaling is not of the kind yarn")
        if LONG in pairs or SHORT in pairs:
            return self._long_and_short(pairs)
        if self.kind == "longrope":
            settings.refuse("rope.scaling.type", f"longrope needs the tensors {SHORT} and {LONG}")
        settings.ignore("rope.scaling.original_context_length", "the scaling does not depend on the length")
        return self._fixed(pairs, dimensions, base)

    def _fixed(
        self, pairs: Mapping[str, NDArray[np.float32]], dimensions: int, base: float
    ) -> dict[str, Any]:
        """No scaling, a linear one, or the same factors at all lengths."""
        factor = self.factor or 1.0
        values = pairs.get(FREQUENCIES)
        if values is not None and factor != 1.0:
            self.settings.refuse("rope.scaling.factor", f"a scaling on top of {FREQUENCIES} is not supported")
            factor = 1.0
        if self.attention != 1.0:
            stretched = np.full(dimensions // 2, factor, np.float32) if values is None else values
            return self._pair_by_pair(stretched, stretched, self.context)
        if values is None:
            return (
                {"rope_type": "default"} if self.factor is None else {"rope_type": "linear", "factor": factor}
            )
        largest = float(values.max())
        expected = llama3_factors(largest, dimensions, base)
        if largest > 1 and np.allclose(values, expected, rtol=_SAME_FACTORS, atol=0):
            return {"rope_type": "llama3", "factor": largest, **_LLAMA3}
        return self._pair_by_pair(values, values, self.context)

    def _long_and_short(self, pairs: Mapping[str, NDArray[np.float32]]) -> dict[str, Any]:
        if LONG not in pairs or SHORT not in pairs or FREQUENCIES in pairs:
            held = ", ".join(pairs)
            raise SourceError(
                f"{self.settings.path}: of the factors, it holds {held}; expected {SHORT} and {LONG}."
            )
        if (self.factor or 1.0) != 1.0:
            self.settings.refuse("rope.scaling.factor", f"a scaling on top of {LONG} is not supported")
        return self._pair_by_pair(pairs[SHORT], pairs[LONG], self.original)

    def _pair_by_pair(
        self, short: NDArray[np.float32], long: NDArray[np.float32], original: int
    ) -> dict[str, Any]:
        return {
            "rope_type": "longrope",
            "short_factor": [float(str(value)) for value in short],
            "long_factor": [float(str(value)) for value in long],
            "attention_factor": self.attention,
            "original_max_position_embeddings": original,
        }

    def _yarn(
        self,
        pairs: Mapping[str, NDArray[np.float32]],
        dimensions: int,
        base: float,
        log_multiplier: bool,
    ) -> dict[str, Any]:
        settings = self.settings
        if pairs:
            settings.refuse("rope.scaling.type", f"yarn on top of {', '.join(pairs)} is not supported")
        if self.factor is None:
            settings.refuse("rope.scaling.type", "yarn needs rope.scaling.factor")
        factor = self.factor or 1.0
        for name, default in _YARN_DEFAULTS.items():
            value = settings.number(f"rope.scaling.{name}", default)
            if value != default:
                settings.refuse(
                    f"rope.scaling.{name}",
                    f"is {value}; llama.cpp counts with {default} in this architecture",
                )
        attention = _magnitude(factor)
        own = settings.number("rope.scaling.yarn_attn_factor", attention)
        if not math.isclose(own, attention, rel_tol=_SAME_FACTORS):
            settings.refuse(
                "rope.scaling.yarn_attn_factor",
                f"is {own}; llama.cpp counts with {attention:.6g} in this architecture",
            )
        multiplier = settings.number("rope.scaling.yarn_log_multiplier", 0.0)
        if multiplier and not log_multiplier:
            settings.refuse(
                "rope.scaling.yarn_log_multiplier", "llama.cpp reads it in other architectures only"
            )
        elif multiplier:
            attention /= _magnitude(factor, multiplier)
        turns = self.original / (2 * math.pi)
        channel = [dimensions * math.log(turns / count) / (2 * math.log(base)) for count in (32.0, 1.0)]
        if max(math.floor(channel[0]), 0) > min(math.ceil(channel[1]), dimensions - 1):
            settings.refuse("rope.scaling.original_context_length", f"{self.original} leaves yarn no ramp")
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": self.original,
            "attention_factor": attention * self.attention,
        }


def _magnitude(factor: float, multiplier: float = 1.0) -> float:
    """YaRN's factor on cosines and sines, arXiv 2309.00071, section 3.4."""
    return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1 else 1.0
