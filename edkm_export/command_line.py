"""Commands that people are told to run: with real paths, ready to be pasted into a shell."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

__all__ = ["command_line"]

_PROGRAM = "edkm-export"


def command_line(*words: object) -> str:
    """A command of this program, quoted for a shell.

    Args:
        words: name of the command and its arguments. Words in capitals that stand for something which the user has
            to fill in (MODEL) are passed as they are.
    """
    return f"{_program()} {shlex.join(map(str, words))}"


def _program() -> str:
    """How this process was started, if that was by our command line; else the name that installing it gives."""
    started = Path(sys.argv[0] if sys.argv else "")
    if started.name == "__main__.py" and started.parent.name == "edkm_export":
        python = Path(sys.executable)
        known = shutil.which(python.name) == str(python)
        return f"{python.name if known else shlex.quote(str(python))} -m edkm_export"
    if started.name == _PROGRAM and len(started.parts) > 1 and shutil.which(_PROGRAM) is None:
        return shlex.quote(str(started))
    return _PROGRAM
