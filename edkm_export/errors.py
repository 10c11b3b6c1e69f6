"""Errors that are the user's to mend.

Each message names the file, the tensor and the offending value, and says what to do next. The command
line prints the message alone, without a traceback, and exits with status 2.
"""

from __future__ import annotations

__all__ = [
    "BackendMissingError",
    "CheckpointError",
    "ConversionError",
    "DiskFullError",
    "EdkmExportError",
    "InputError",
    "OutputExistsError",
    "PackageError",
    "PaletteError",
    "RecipeError",
    "SourceError",
    "TrainingError",
    "UnsupportedOpError",
]


class EdkmExportError(Exception):
    """Base of every error that this project raises on purpose."""


class PaletteError(EdkmExportError, ValueError):
    """A palettized tensor whose parts do not fit together."""


class CheckpointError(EdkmExportError):
    """A model.pt that cannot be read, or must not be."""


class RecipeError(EdkmExportError, ValueError):
    """A palettization recipe that is malformed, or does not fit the model."""


class InputError(EdkmExportError, ValueError):
    """A model, text or option that the command cannot use."""


class SourceError(InputError):
    """A model that holds something that is not understood, so that it would be read as another model."""


class OutputExistsError(EdkmExportError):
    """The output is already there and overwriting it was not asked for."""


class DiskFullError(EdkmExportError, OSError):
    """There is no space for the output; the message names what is needed and what is free."""


class ConversionError(EdkmExportError):
    """A conversion that would not be exact or would not load."""


class PackageError(EdkmExportError):
    """An .mlpackage or ONNX folder that is damaged, hostile or not understood."""


class UnsupportedOpError(PackageError):
    """A program holds an operation, or a form of one, that the interpreter does not support."""


class TrainingError(EdkmExportError):
    """Training cannot go on; the message names the last checkpoint that is whole."""


class BackendMissingError(EdkmExportError, ImportError):
    """An optional dependency is not installed; the message holds the line that installs it."""
