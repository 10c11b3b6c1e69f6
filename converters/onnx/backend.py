"""The one place that imports onnx and onnxruntime, which are optional.

`import converters.onnx` works without them.
"""

from __future__ import annotations

from typing import Any

from edkm_export.errors import BackendMissingError

__all__ = ["load_onnx", "load_onnxruntime"]


def load_onnx() -> Any:
    """The onnx module.

    Raises:
        BackendMissingError: it is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise BackendMissingError("ONNX graphs need onnx: pip install 'edkm-export[onnx]'") from error
    return onnx


_FATAL = 4  # severity of onnxruntime's logs


def load_onnxruntime() -> Any:
    """The onnxruntime module, silent: what it logs goes past the console, in colour, and what fails is raised as well.

    Raises:
        BackendMissingError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendMissingError(
            "running ONNX graphs needs onnxruntime: pip install 'edkm-export[onnx]'"
        ) from error
    onnxruntime.set_default_logger_severity(_FATAL)
    return onnxruntime
