"""What transformers says while a model is loaded: quietened, and its errors in words that say what to do."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from edkm_export.errors import BackendMissingError, EdkmExportError, InputError

__all__ = ["explained", "first_line", "without_bars"]


@contextlib.contextmanager
def explained(reference: str, *, needed: str, advice: str) -> Iterator[None]:
    """Turn what transformers raises for a bad model into one line that says what to do.

    Args:
        reference: what the user gave as MODEL.
        needed: the extra of edkm-export that holds a package that is missing.
        advice: what to check when the model cannot be loaded.

    Raises:
        BackendMissingError: a package is missing.
        InputError: anything else.
    """
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except EdkmExportError:
        raise
    except ImportError as error:
        raise BackendMissingError(
            f"{reference}: {first_line(error)}; pip install 'edkm-export[{needed}]'"
        ) from error
    except Exception as error:  # what a damaged model raises has no common base
        raise InputError(f"{reference}: cannot be loaded ({first_line(error)}); {advice}.") from error
    finally:
        logger.setLevel(level)


def first_line(error: BaseException) -> str:
    """Of its message, at most 200 characters; its type, if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:200] if lines else type(error).__name__


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Without the bars of transformers. Standard error stays open: the caller's own bar is drawn there."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
