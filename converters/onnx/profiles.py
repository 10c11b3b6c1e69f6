"""The three ways in which weights take part in a graph: exact, low-memory and fast."""

from __future__ import annotations

from converters.onnx.fast import FastForms, StandardFastForms
from converters.onnx.forms import ExactForms, Forms, LowMemoryForms

__all__ = ["PROFILES", "ExactForms", "FastForms", "Forms", "LowMemoryForms", "StandardFastForms"]

PROFILES: dict[str, type[Forms]] = {"exact": ExactForms, "low-memory": LowMemoryForms, "fast": FastForms}
"""By the name that the command line uses."""
