"""A training run that has not finished, told from its folder. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path

from edkm_export.atomic import MARKER
from edkm_export.command_line import command_line
from edkm_export.regular_file import read_regular

__all__ = ["unfinished_run"]


def unfinished_run(path: Path) -> str:
    """What to say of a checkpoint that is missing because its training run has not finished; empty otherwise.

    Args:
        path: of the checkpoint, or the folder of the run.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / "model.pt").exists() or not (path.is_dir() or (path.suffix == ".pt" and not path.exists())):
        return ""
    try:
        metadata = json.loads(read_regular(folder / MARKER))
        if metadata["kind"] != "run":
            return ""
        command = [word for word in metadata.get("command", []) if word not in ("--resume", "--overwrite")]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    way = (
        f"finish it with: {command_line(*command[1:], '--resume')}"
        if command and all(isinstance(word, str) for word in command)
        else "finish it with the command that started it and --resume"
    )
    return f"the training run in {folder} has not finished, so that there is no model.pt yet; {way}"
