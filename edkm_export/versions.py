"""What a checkpoint was made with."""

from __future__ import annotations

import platform

from edkm_export._version import __version__

__all__ = ["library_versions"]


def library_versions() -> dict[str, str]:
    """Versions of this project, of Python and of the libraries that decide the numbers."""
    import numpy
    import torch
    import transformers

    return {
        "edkm-export": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
    }
