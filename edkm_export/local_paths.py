"""Paths of the maker's machine, kept out of what is shipped: names of files stay, the folders above them go."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

__all__ = ["nearby", "without_folders"]

_OPTION = re.compile(r"(--[\w-]+=)(/.*)", re.DOTALL)
# An absolute path within a sentence; what follows a letter, a colon or a slash is part of an address or a fraction.
_WITHIN = re.compile(r"(?<![\w:/.~-])(?:/[^\s/'\"`,;:()\[\]]+)+/([^\s/'\"`,;:()\[\]]+)")


def without_folders(value: Any) -> Any:
    """The same, with the last part in place of each absolute path.

    Args:
        value: a string (a path, a word of a command, or a sentence), or lists and dicts of strings, as deep as they
            are; keys are treated too. Anything else is returned as it is.
    """
    if isinstance(value, str):
        return _name(value)
    if isinstance(value, dict):
        found: dict[Any, Any] = {}
        for key, inner in value.items():
            name = short = without_folders(key)
            count = 1
            while name in found:  # two files of one name
                count += 1
                name = f"{short} ({count})"
            found[name] = without_folders(inner)
        return found
    if isinstance(value, list | tuple):
        return type(value)(without_folders(inner) for inner in value)
    return value


def nearby(path: str, folder: Path) -> str:
    """An absolute path as seen from a folder, with ./ or ../ in front; its last part alone, where both share no folder.

    Args:
        path: absolute; others are returned as they are.
        folder: of the file that is to name it.
    """
    if not Path(path).is_absolute():
        return path
    place = str(folder.absolute())
    if os.path.commonpath([path, place]) in (os.sep, str(Path.home())):
        return Path(path).name
    seen = Path(os.path.relpath(path, place)).as_posix()
    return seen if seen.startswith("..") else f"./{seen}"  # not to be taken for the name of a hub model


def _name(text: str) -> str:
    if option := _OPTION.fullmatch(text):
        return option[1] + _name(option[2])
    path = Path(text)
    there = os.path.exists(text)  # noqa: PTH110, Path.exists raises for names that are too long
    if path.is_absolute() and (there or (len(path.parts) > 2 and not re.search(r"\s", text))):
        return path.name or text
    return _WITHIN.sub(r"\1", text)
