"""The one place that imports coremltools, which is optional and talkative.

`import converters.coreml` works without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from operator import length_hint
from typing import Any

from edkm_export.activity import tracked
from edkm_export.errors import BackendMissingError
from edkm_export.library_logs import quiet_logs

__all__ = ["load_coremltools", "model_message", "quiet"]


def load_coremltools() -> Any:
    """The coremltools module, imported without its warnings.

    Raises:
        BackendMissingError: it is not installed.
    """
    try:
        with quiet():
            import coremltools
    except ImportError as error:
        raise BackendMissingError(
            "Core ML packages need coremltools: pip install 'edkm-export[coreml]'"
        ) from error
    return coremltools


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence coremltools' warnings about library versions it was not tested with; its bars become activities."""
    from tqdm import tqdm  # coremltools and transformers depend on it

    init, iterate = tqdm.__init__, tqdm.__iter__

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{**kwargs, "disable": True})
        self.counted = (
            _words(kwargs.get("desc")),
            str(kwargs.get("unit", "")).strip(),
        )  # disabled, it forgets them

    def count(self: Any) -> Iterator[Any]:
        words, unit = self.counted
        return tracked(self.iterable, words, unit, total=length_hint(self.iterable) or None)

    with quiet_logs("coremltools"):
        try:
            tqdm.__init__, tqdm.__iter__ = begin, count
            yield
        finally:
            tqdm.__init__, tqdm.__iter__ = init, iterate


def _words(description: Any) -> str:
    """What coremltools does, in words; its own name intermediate forms."""
    known = {
        "Converting PyTorch": "converting operations of PyTorch",
        "Running MIL frontend": "passes over the converted operations",
        "Running MIL default": "optimization passes",
        "Running MIL backend": "passes for the package",
    }
    return next((words for start, words in known.items() if str(description).startswith(start)), "converting")


def model_message() -> Any:
    """Make an empty `CoreML.Specification.Model` message.

    Raises:
        BackendMissingError: coremltools is not installed.
    """
    load_coremltools()
    from coremltools.proto import Model_pb2

    return Model_pb2.Model()
