"""PyTorch language models to Core ML and ONNX at 2-4 bits a weight, exactly and provably.

    checkpoint = edkm_export.palettize(model_or_path, tokenizer, calibration=texts, bits=4)
    exported = edkm_export.export(checkpoint, "model-coreml", format="coreml")
    report = edkm_export.verify(exported)

Each name is imported when it is used: importing this package takes neither torch nor any back end.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from edkm_export._version import __version__

if TYPE_CHECKING:
    from edkm_export.api.exporting import Exported, export
    from edkm_export.api.palettizing import palettize
    from edkm_export.api.verifying import verify
    from edkm_export.checkpoint import Checkpoint, load
    from edkm_export.errors import EdkmExportError
    from edkm_export.palette import PalettizedTensor
    from edkm_export.recipe import Recipe
    from edkm_export.reference.decoded_module import decoded_module
    from edkm_export.token_ids import as_ids
    from edkm_export.verify.report import Report

__all__ = [
    "Checkpoint",
    "EdkmExportError",
    "Exported",
    "PalettizedTensor",
    "Recipe",
    "Report",
    "__version__",
    "as_ids",
    "decoded_module",
    "export",
    "load",
    "palettize",
    "verify",
]

_MODULES = {
    "Checkpoint": "checkpoint",
    "EdkmExportError": "errors",
    "Exported": "api.exporting",
    "PalettizedTensor": "palette",
    "Recipe": "recipe",
    "Report": "verify.report",
    "as_ids": "token_ids",
    "decoded_module": "reference.decoded_module",
    "export": "api.exporting",
    "load": "checkpoint",
    "palettize": "api.palettizing",
}


def __getattr__(name: str) -> Any:
    """Import torch when it is needed: `edkm-export --help` must answer at once."""
    if name == "verify":  # the package of that name, which can be called
        return importlib.import_module("edkm_export.verify")
    if name in _MODULES:
        return getattr(importlib.import_module(f"edkm_export.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
