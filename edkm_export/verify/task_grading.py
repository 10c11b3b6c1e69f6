"""Whether an answer is right.

- exact: the texts are equal after normalization: Unicode NFKC, runs of white space as one space, none at the ends, one
  full stop at the end and one pair of quotes or backticks around the rest dropped. Case counts.
- number: the normalized answer is a number and nothing else (digits, with commas between thousands or a decimal point),
  of the same value.
- json: the answer is a JSON value and nothing else, but for a code fence around it, and equal to the expected one: keys
  in any order, 1 and 1.0 alike, true not 1.
- tool-call: the same, with `<tool_call>` around it or not: an object with the name, and the arguments under "arguments"
  or "parameters"; a list with one such object too.
"""

from __future__ import annotations

import json
import re
import unicodedata
from decimal import Decimal
from typing import Any, NoReturn

from edkm_export.verify.tasks import GenerationItem

__all__ = ["is_right", "normalized"]

_QUOTES = (('"', '"'), ("'", "'"), ("`", "`"), ("\u201c", "\u201d"), ("\u2018", "\u2019"))
_NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?")
_FENCE = re.compile(r"```[A-Za-z]*\s*\n(.*?)\n?\s*```", re.DOTALL)
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def normalized(text: str) -> str:
    """As `exact` compares it."""
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    text = text[:-1] if text.endswith(".") else text
    for begin, end in _QUOTES:
        if len(text) > 1 and text.startswith(begin) and text.endswith(end):
            return text[1:-1].strip()
    return text.strip()


def is_right(item: GenerationItem, text: str) -> bool:
    """Compare an answer with those that are right."""
    return any(_matches(item.match, text, answer) for answer in item.answers)


def _matches(match: str, text: str, answer: Any) -> bool:
    if match == "exact":
        return normalized(text) == normalized(answer)
    if match == "number":
        found, wanted = _number(text), _number(answer)
        return found is not None and found == wanted
    try:
        value = _parsed(text, calls=match == "tool-call")
    except (ValueError, RecursionError):
        return False
    return _same(value, answer) if match == "json" else _same_call(value, answer)


def _number(text: str) -> Decimal | None:
    found = normalized(text)
    return Decimal(found.replace(",", "")) if _NUMBER.fullmatch(found) else None


def _parsed(text: str, *, calls: bool) -> Any:
    text = text.strip()
    if calls and (tagged := _CALL.fullmatch(text)):
        text = tagged[1].strip()
    if fenced := _FENCE.fullmatch(text):
        text = fenced[1]
    return json.loads(text, parse_constant=_refuse)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _same_call(value: Any, wanted: Any) -> bool:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, dict):
        return False
    call = value.get("function") if isinstance(value.get("function"), dict) else value
    assert isinstance(call, dict)
    arguments = call.get("arguments", call.get("parameters"))
    return call.get("name") == wanted["name"] and _same(arguments, wanted["arguments"])


def _same(one: Any, other: Any) -> bool:
    """Equal JSON values; a truth value is no number."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
