"""Local paths do not ship: what goes into an exported folder names files, and not the folders above them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Set
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

__all__ = ["names_only", "without_paths"]

_PART = r"[^\s/\\'\"`,;:()\[\]{}<>|]+"
# Not inside a word, a URL or a relative path. A backslash alone may be an escape, so it needs a drive before it.
_PATHS = re.compile(
    rf"(?:file://|(?<![\w./\\:~-])(?:~[\w.-]*(?=/))?)/(?:{_PART}/+)*({_PART})/?"
    rf"|(?<![\w./\\:~-])[A-Za-z]:[\\/](?:{_PART}[\\/]+)*({_PART})[\\/]?"
)
# What stands in quotes may hold spaces.
_QUOTED = re.compile(r"(['\"`])(?:file://|~[\w.-]*)?/(?:[^'\"`\n/]+/)+([^'\"`\n/]+)/?\1")
_WHOLE = re.compile(r"(?:/|~[\w.-]*/|[A-Za-z]:[\\/])[^:;,'\"`\n]*\Z")


def without_paths(text: str, known: Iterable[str] = ()) -> str:
    """A text with the name of each file in place of its absolute path; relative paths and URLs stay.

    Args:
        text: any text.
        known: absolute paths that may stand in it, or above a path in it; where one holds spaces, only this tells where
            it ends.
    """
    option, equals, value = text.partition("=")
    if equals and option.startswith("--") and " " not in option and _is_path(value):
        return f"{option}={_name(value)}"
    if _is_path(text):
        return _name(text)
    for path in sorted(known, key=len, reverse=True):
        text = re.sub(rf"{re.escape(path)}((?:/+{_PART})*)/?", lambda found: _name(found[0]), text)
    text = _QUOTED.sub(lambda found: f"{found[1]}{found[2]}{found[1]}", text)
    return _PATHS.sub(lambda found: found[1] or found[2], text)


def names_only(value: Any) -> Any:
    """The same for every text in lists and dicts, keys included; a name that comes twice is numbered."""
    whole = {text for text in _texts(value) if " " in text and "/" in text[1:] and _is_path(text)}
    known = whole | {parent for text in whole if " " in (parent := text.rpartition("/")[0])}
    return _named(value, known)


def _named(value: Any, known: Set[str]) -> Any:
    if isinstance(value, str):
        return without_paths(value, known)
    if isinstance(value, (list, tuple)):
        return type(value)(_named(item, known) for item in value)
    if not isinstance(value, dict):
        return value
    named: dict[Any, Any] = {}
    for key, item in value.items():
        name = words = _named(key, known)
        count = 2
        while name in named:
            name, count = f"{words} ({count})", count + 1
        named[name] = _named(item, known)
    return named


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)


def _is_path(text: str) -> bool:
    """Whether a text is one absolute path, which may hold spaces, and nothing else."""
    return _WHOLE.match(text) is not None and " /" not in text


def _name(path: str) -> str:
    name = PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name
    return name or path
