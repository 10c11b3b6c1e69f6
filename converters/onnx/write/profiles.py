"""The three ways in which weights take part in a graph: exact, low-memory and fast."""

from __future__ import annotations

from converters.onnx.write.fast import FastForms, StandardFastForms
from converters.onnx.write.forms import ExactForms, Forms, LowMemoryForms

__all__ = ["FORMS_OF_PROFILE", "ExactForms", "FastForms", "Forms", "LowMemoryForms", "StandardFastForms"]

FORMS_OF_PROFILE: dict[str, type[Forms]] = {
    "exact": ExactForms,
    "low-memory": LowMemoryForms,
    "fast": FastForms,
}
"""By the name that the command line uses."""
