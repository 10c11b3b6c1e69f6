"""The one place that imports Apple's Core AI packages, which are optional and exist for few platforms.

`import converters.coreai` works without them, and so does everything that only reads files.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from edkm_export.errors import BackendMissingError

__all__ = ["load_authoring", "load_converter", "load_runtime", "missing_backend", "quiet"]

_INSTALL = "pip install 'edkm-export[coreai]'"


def missing_backend() -> str:
    """Why Core AI cannot be used here; empty when it can."""
    from importlib.util import find_spec

    if find_spec("coreai") is not None:
        return ""
    if sys.version_info < (3, 11):
        found = platform.python_version()
        return f"Core AI needs Python 3.11 or later, this is {found}; with a later one: {_INSTALL}"
    if sys.platform not in ("linux", "darwin") or (
        sys.platform == "linux" and platform.machine() != "x86_64"
    ):
        where = f"{sys.platform} on {platform.machine()}"
        return f"Apple publishes no Core AI package for {where}; use Linux (x86-64) or macOS"
    return f"Core AI is not installed: {_INSTALL}"


def load_authoring() -> Any:
    """What it takes to make and change programs.

    Returns:
        A namespace: `ops` (the dialect), `ir` (MLIR types and insertion points), `elements` (type, data -> constant
        attribute), `Program`, `Asset`, `Metadata`, `Module`.

    Raises:
        BackendMissingError: coreai-core is not installed.
    """
    _require()
    with quiet():
        # authoring comes first: importing a dialect before it is a circular import in coreai-core 1.0.0b3
        import coreai.authoring as authoring
        from coreai._compiler import ir
        from coreai._compiler._mlir_libs._coreaiIR._bindings import mlir
        from coreai._compiler.dialects import coreai as ops
        from coreai.runtime import AIModelAssetMetadata

    def elements(kind: Any, data: Any) -> Any:
        return mlir.dialects.coreai.create_elements_attr(ir.Location.unknown(), kind, data)

    return SimpleNamespace(
        ops=ops,
        ir=ir,
        elements=elements,
        Program=authoring.AIProgram,
        Asset=authoring.AIModelAsset,
        Module=authoring.Module,
        Metadata=AIModelAssetMetadata,
    )


def load_converter() -> Any:
    """The coreai_torch module.

    Raises:
        BackendMissingError: coreai-torch is not installed.
    """
    _require()
    try:
        with quiet():
            import coreai_torch
    except ImportError as error:
        raise BackendMissingError(f"Core AI exports need coreai-torch: {_INSTALL} ({error})") from error
    return coreai_torch


def load_runtime() -> Any:
    """`Asset` and `NDArray`, to run a model, as a namespace.

    Raises:
        BackendMissingError: coreai-core is not installed.
    """
    _require()
    with quiet():
        from coreai.authoring import AIModelAsset
        from coreai.runtime import NDArray
    return SimpleNamespace(Asset=AIModelAsset, NDArray=NDArray)


def _require() -> None:
    if reason := missing_backend():
        raise BackendMissingError(reason)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings about versions, progress lines, and what native code writes to standard error.

    Errors are exceptions all the same, and our own progress is shown.
    """
    sys.stderr.flush()
    before = logging.root.manager.disable
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    told = _Aside(sys.stderr, kept)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(told),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        told.rich_proxied_file.flush()
        sys.stderr.flush()
        logging.disable(before)
        os.dup2(kept, 2)
        os.close(kept)


class _Aside(io.StringIO):
    """Takes what libraries print to standard error, and lets consoles of rich write past it.

    Args:
        stream: standard error as it is now.
        kept: a descriptor of where it goes.

    Attributes:
        rich_proxied_file: where those consoles write, by the name that rich gives it.
    """

    def __init__(self, stream: Any, kept: int) -> None:
        super().__init__()
        stream = getattr(stream, "rich_proxied_file", stream)
        try:
            own = stream.fileno() == 2
        except (OSError, ValueError):  # a stream in memory
            own = False
        self.rich_proxied_file: Any = stream
        if own:
            self.rich_proxied_file = os.fdopen(
                kept, "w", encoding=stream.encoding, errors=stream.errors, closefd=False
            )
