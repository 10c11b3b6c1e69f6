"""What can go wrong while a model trains, said in one line."""

from __future__ import annotations

from edkm_export.errors import EdkmExportError

__all__ = ["TrainingError"]


class TrainingError(EdkmExportError):
    """Training cannot go on; the message names the last checkpoint that is whole."""
