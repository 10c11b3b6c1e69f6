"""Core ML: reading and running packages; conversion.

Importing this package does not import coremltools.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converters.coreml.conversion import convert, save_package
    from converters.coreml.package import Package, load_package

__all__ = ["Package", "convert", "load_package", "save_package"]

_MODULES = {
    "Package": "package",
    "load_package": "package",
    "convert": "conversion",
    "save_package": "conversion",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"converters.coreml.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
