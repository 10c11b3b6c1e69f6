"""A mistake of ours: one line for the user, and a log to send with a report."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import traceback
from pathlib import Path

from edkm_export._version import __version__
from edkm_export.limits import words_of
from edkm_export.plain_data import printable

__all__ = ["in_one_line", "loaded_versions", "our_mistake"]


def our_mistake(error: BaseException) -> str:
    """What to say of an error that nobody raised on purpose.

    Its traceback goes to the log file that the user named, or else to one of its own among the temporary files; with
    --verbose also to standard error.

    Returns:
        One line, which names the log.
    """
    from edkm_export.cli.common_options import is_verbose, log_path

    text = _traceback(error)
    if is_verbose():
        print(text, file=sys.stderr, end="")
    log = log_path() or _written(text)
    where = "" if is_verbose() else "; --verbose shows the place in the code"
    send = (
        f"report it with {log}, which holds the command line"
        if log
        else "report it with the output of --verbose"
    )
    return f"this is our mistake, not yours: {in_one_line(error)}. Please {send}{where}."


def in_one_line(error: BaseException) -> str:
    """Kind of an error, and the first line of what it says."""
    first = (words_of(error).strip().splitlines() or [""])[0].rstrip(".")
    return printable(f"{type(error).__name__}: {first}") if first else type(error).__name__


def _traceback(error: BaseException) -> str:
    try:
        return printable("".join(traceback.format_exception(error)))
    except Exception:  # an error that cannot be printed, or too deep a chain
        return f"{type(error).__name__}\n{''.join(traceback.format_tb(error.__traceback__))}"


def _written(text: str) -> Path | None:
    """A new file with the traceback and what else a report needs; None: there is no place for it."""
    lines = [
        f"edkm-export {__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"command: {sys.argv}",
        f"libraries: {loaded_versions()}",
        "",
        text,
    ]
    try:
        descriptor, name = tempfile.mkstemp(prefix="edkm-export-", suffix=".log")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join(lines))
    except OSError:
        return None
    return Path(name)


def loaded_versions() -> str:
    """Versions of the libraries that were imported, as far as they say it, in one line."""
    names = ("torch", "transformers", "numpy", "coremltools", "onnx", "onnxruntime", "gguf", "peft")
    loaded = {name: getattr(sys.modules.get(name), "__version__", None) for name in names}
    return ", ".join(f"{name} {version}" for name, version in loaded.items() if version)
