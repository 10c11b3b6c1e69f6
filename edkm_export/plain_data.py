"""Plain data: what JSON can hold, with texts that UTF-8 can."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["as_plain", "is_utf8", "not_plain", "printable"]

_DEPTH = 64  # far deeper than any configuration


def printable(text: str) -> str:
    r"""The text, with `\udc..` in place of what is not UTF-8, as names of files may hold it."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def is_utf8(text: str) -> bool:
    """Whether a text, such as the name of a file, can be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def as_plain(value: dict[str, Any]) -> dict[str, Any]:
    """A copy of nothing but plain Python; subclasses of str and the like become what they are of.

    Raises:
        TypeError: it holds something that JSON does not.
    """
    plain: dict[str, Any] = json.loads(json.dumps(value))
    cleaned = _clean(plain)
    assert isinstance(cleaned, dict)
    return cleaned


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [_clean(each) for each in value]
    if isinstance(value, dict):
        return {printable(key): _clean(each) for key, each in value.items()}
    return value


def not_plain(value: Any, where: str, depth: int = 0) -> str:
    """What is in the way of a value being plain data; empty: nothing is.

    Args:
        value: from a file that anybody may have written.
        where: what it is called, for the message.
        depth: how deep it lies in another one.
    """
    if depth > _DEPTH:
        return f"{where[:80]}... is nested too deeply"
    if isinstance(value, str):
        return "" if is_utf8(value) else f"{where} is no UTF-8 text"
    if type(value) is list:
        inner = ((each, f"{where}[{number}]") for number, each in enumerate(value))
    elif type(value) is dict:
        for key in value:
            if type(key) is not str or not is_utf8(key):
                return f"{where} has the key {key!r}, which is no text"
        inner = ((each, f"{where}.{key}") for key, each in value.items())
    else:
        plain = value is None or type(value) in (bool, int, float)
        return "" if plain else f"{where} is {type(value).__name__}, which is no plain data"
    return next((fault for each, name in inner if (fault := not_plain(each, name, depth + 1))), "")
