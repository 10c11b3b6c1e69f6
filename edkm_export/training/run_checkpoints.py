"""Checkpoints of a run: each is whole or does not count."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

__all__ = [
    "OPTIMIZER",
    "SCHEDULER",
    "WEIGHTS",
    "clear",
    "complete",
    "drop_partial",
    "last_complete",
    "read_state",
    "retire",
]

WEIGHTS = "weights.pt"
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"  # as transformers' Trainer calls them
_MARK = "complete.json"  # written last
_NAME = re.compile(r"checkpoint-(\d+)")


def _step(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    return int(found.group(1)) if found else -1


def _all(folder: Path) -> list[Path]:
    """Checkpoints from the oldest to the newest, partial ones included."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _step(path) >= 0), key=_step)


def complete(path: Path, state: dict[str, Any]) -> None:
    """Flush a checkpoint to the disk and mark it as whole."""
    for file in path.rglob("*"):
        if file.is_file():
            _flush(file)
    partial = path / f".{_MARK}.partial"
    partial.write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _flush(partial)
    partial.replace(path / _MARK)
    if os.name == "posix":
        _flush(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def last_complete(folder: Path) -> Path | None:
    """The newest checkpoint that is whole."""
    return next((path for path in reversed(_all(folder)) if (path / _MARK).is_file()), None)


def read_state(path: Path) -> dict[str, Any]:
    """What was given to `complete`."""
    state: dict[str, Any] = json.loads((path / _MARK).read_text(encoding="utf-8"))
    return state


def retire(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints that are whole."""
    whole = [path for path in _all(folder) if (path / _MARK).is_file()]
    for path in whole[: max(0, len(whole) - keep)]:
        (path / _MARK).unlink()  # from here on it does not count
        shutil.rmtree(path)


def drop_partial(folder: Path) -> None:
    """Remove what an interrupted run left unfinished."""
    for path in _all(folder):
        if not (path / _MARK).is_file():
            shutil.rmtree(path)


def clear(folder: Path) -> None:
    """Remove all checkpoints."""
    for path in _all(folder):
        (path / _MARK).unlink(missing_ok=True)
        shutil.rmtree(path)
