"""Floats that JSON has no number for, as transformers writes them: {"__float__": "Infinity"}."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["decode_object", "encode"]

_KEY = "__float__"
_NAMES = ("Infinity", "-Infinity", "NaN")


def decode_object(value: dict[str, Any]) -> Any:
    """The float that an object stands for, or the object; `json.loads` takes it as `object_hook`."""
    name = value.get(_KEY)
    return float(name) if len(value) == 1 and name in _NAMES else value


def encode(value: Any) -> Any:
    """A copy in which each of these floats is an object, through lists and dictionaries."""
    if isinstance(value, float) and not math.isfinite(value):
        return {_KEY: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, dict):
        return {key: encode(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(each) for each in value]
    return value
