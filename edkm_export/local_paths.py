"""Paths of the maker's machine, kept out of what is shipped: names of files stay, the folders above them go."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Set
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

__all__ = ["without_folders"]

_PART = r"[^\s/\\'\"`,;:()\[\]{}<>|]+"
# An absolute path within a sentence, with at least one folder: "/think" may be a word of a prompt. What follows a
# letter, a colon or a slash is part of an address or a fraction. A backslash alone may be an escape: it needs a drive.
_WITHIN = re.compile(
    rf"(?:file://|(?<![\w./\\:~-])(?:~[\w.-]*(?=/))?)/(?:{_PART}/+)+({_PART})/?"
    rf"|(?<![\w./\\:~-])[A-Za-z]:[\\/](?:{_PART}[\\/]+)*({_PART})[\\/]?"
)
# What stands in quotes may hold spaces.
_QUOTED = re.compile(r"(['\"`])(?:file://|~[\w.-]*)?/(?:[^'\"`\n/]+/)+([^'\"`\n/]+)/?\1")
_OPTION = re.compile(r"(--[\w-]+=)(.*)", re.DOTALL)
_WHOLE = re.compile(r"(?:/|~[\w.-]*/|[A-Za-z]:[\\/])[^:;,'\"`\n]*\Z")


def without_folders(value: Any) -> Any:
    """The same, with the last part in place of each absolute path.

    Args:
        value: a string (a path, a word of a command, or a sentence), or lists and dicts of strings, as deep as they
            are; keys are treated too, and a name that comes twice is numbered. Anything else is returned as it is.
            A path with spaces is recognized when it stands alone or in quotes, and in a sentence when it, or a path
            beside it, also stands alone somewhere in `value`.
    """
    whole = {text for text in _texts(value) if " " in text and "/" in text[1:] and _is_path(text)}
    return _named(value, whole | {above for text in whole if " " in (above := text.rpartition("/")[0])})


def _named(value: Any, known: Set[str]) -> Any:
    if isinstance(value, str):
        return _without(value, known)
    if isinstance(value, list | tuple):
        return type(value)(_named(inner, known) for inner in value)
    if not isinstance(value, dict):
        return value
    found: dict[Any, Any] = {}
    for key, inner in value.items():
        name = short = _named(key, known)
        count = 1
        while name in found:  # two files of one name
            count += 1
            name = f"{short} ({count})"
        found[name] = _named(inner, known)
    return found


def _without(text: str, known: Set[str]) -> str:
    if option := _OPTION.fullmatch(text):
        return option[1] + _without(option[2], known)
    if _is_path(text):
        return _last(text)
    for path in sorted(known, key=len, reverse=True):
        text = re.sub(rf"{re.escape(path)}((?:/+{_PART})*)/?", lambda found: _last(found[0]), text)
    text = _QUOTED.sub(lambda found: f"{found[1]}{found[2]}{found[1]}", text)
    return _WITHIN.sub(lambda found: found[1] or found[2], text)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)


def _is_path(text: str) -> bool:
    """Whether a text is one absolute path, which may hold spaces, and nothing else."""
    if _WHOLE.match(text) is None or " /" in text:
        return False
    return text.count("/") > 1 or "\\" in text or os.path.exists(text)  # noqa: PTH110, Path.exists raises for long names


def _last(path: str) -> str:
    name = PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name
    return name or path
