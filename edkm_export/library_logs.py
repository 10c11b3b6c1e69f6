"""What libraries have to say: nothing, unless somebody asked for it."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

__all__ = ["are_wanted", "quiet_logs", "silence"]


def are_wanted() -> bool:
    """Whether the application listens, as `edkm-export --verbose` does: the root logger takes informative records."""
    return logging.getLogger().isEnabledFor(logging.INFO)


def silence(library: str) -> None:
    """Let a library log errors alone from now on, unless more is wanted."""
    if not are_wanted():
        logging.getLogger(library).setLevel(logging.ERROR)


@contextlib.contextmanager
def quiet_logs(library: str) -> Iterator[None]:
    """Let a library log errors alone, and nobody warn, unless more is wanted."""
    if are_wanted():
        yield
        return
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
