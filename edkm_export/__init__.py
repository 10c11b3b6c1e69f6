"""PyTorch language models to Core ML at 2-4 bits a weight, exactly and provably."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edkm_export._version import __version__

if TYPE_CHECKING:
    from edkm_export.palette import PalettizedTensor

__all__ = ["PalettizedTensor", "__version__"]


def __getattr__(name: str) -> Any:
    """Import torch when it is needed: `edkm-export --help` must answer at once."""
    if name == "PalettizedTensor":
        from edkm_export.palette import PalettizedTensor

        return PalettizedTensor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
