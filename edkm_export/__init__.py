"""PyTorch language models to Core ML at 2-4 bits a weight, exactly and provably."""

from edkm_export._version import __version__
from edkm_export.palette import PalettizedTensor

__all__ = ["PalettizedTensor", "__version__"]
