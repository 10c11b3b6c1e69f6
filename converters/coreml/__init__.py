"""Core ML: reading and running packages; conversion.

Importing this package does not import coremltools.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converters.coreml.read.package import Package, load_package
    from converters.coreml.write.conversion import convert, save_package

__all__ = ["Package", "convert", "load_package", "save_package"]

_MODULES = {
    "Package": "read.package",
    "load_package": "read.package",
    "convert": "write.conversion",
    "save_package": "write.conversion",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"converters.coreml.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
