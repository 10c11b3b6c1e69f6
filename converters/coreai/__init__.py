"""Core AI: reading and running exported models; conversion.

Importing this package imports none of Apple's packages, and neither does reading files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converters.coreai.read.asset import Asset, load_asset

__all__ = ["Asset", "load_asset"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from converters.coreai.read import asset

        return getattr(asset, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
