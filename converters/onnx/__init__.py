"""ONNX: reading and running exported folders; conversion.

Importing this package imports neither onnx nor onnxruntime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converters.onnx.read.lut_graph import LutGraph, load_graph

__all__ = ["LutGraph", "load_graph"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from converters.onnx.read import lut_graph

        return getattr(lut_graph, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
