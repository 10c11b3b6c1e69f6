"""Core ML: reading and running packages; conversion.

Importing this package does not import coremltools.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converters.coreml.package import Package, load_package

__all__ = ["Package", "load_package"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from converters.coreml import package

        return getattr(package, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
