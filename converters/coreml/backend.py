"""The one place that imports coremltools, which is optional and talkative.

`import converters.coreml` works without it.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from edkm_export.errors import BackendMissingError

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
    """Silence coremltools' progress bars and its warnings about library versions it was not tested with."""
    logger = logging.getLogger("coremltools")
    level, logger.level = logger.level, logging.ERROR
    from tqdm import tqdm  # coremltools and transformers depend on it

    shown = tqdm.__init__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tqdm.__init__ = lambda self, *args, **kwargs: shown(self, *args, **{**kwargs, "disable": True})
            yield
        finally:
            logger.level = level
            tqdm.__init__ = shown


def model_message() -> Any:
    """Make an empty `CoreML.Specification.Model` message.

    Raises:
        BackendMissingError: coremltools is not installed.
    """
    load_coremltools()
    from coremltools.proto import Model_pb2

    return Model_pb2.Model()
