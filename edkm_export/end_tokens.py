"""The tokens at which a text ends: the same set wherever a model goes.

Chat models often name the end of a turn in one file and the end of a text in another, so all are taken; none is made
up where no file names any.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from edkm_export.special_floats import encode

__all__ = ["as_setting", "end_tokens", "read_object", "stored_end_tokens", "with_end_tokens"]

_KEY = "eos_token_id"


def end_tokens(*settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Every end token that some settings name, each once, in their order.

    Args:
        settings: contents of generation_config.json, of config.json, and the tokenizer's `eos_token_id` in a dict.
    """
    found: dict[int, None] = {}
    for each in settings:
        value = each.get(_KEY)
        for token in value if isinstance(value, (list, tuple)) else (value,):
            if type(token) is int and token >= 0:
                found[token] = None
    return tuple(found)


def as_setting(ends: tuple[int, ...]) -> int | list[int] | None:
    """The value of `eos_token_id`: a number, a list, or None where there is no end token."""
    return None if not ends else ends[0] if len(ends) == 1 else list(ends)


def stored_end_tokens(config: Mapping[str, Any], files: Mapping[str, bytes]) -> tuple[int, ...]:
    """End tokens of a checkpoint.

    Args:
        config: Hugging Face configuration.
        files: tokenizer and generation settings, {name: bytes}.
    """
    generation = read_object(files.get("generation_config.json"))
    return end_tokens(generation, config, {_KEY: _tokenizer_end(files)})


def with_end_tokens(config: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, Any]:
    """A configuration, as config.json holds it, that names every end token of a checkpoint.

    Arguments as for `stored_end_tokens`.
    """
    ends = stored_end_tokens(config, files)
    return {**encode(dict(config)), **({_KEY: as_setting(ends)} if ends else {})}


def read_object(content: bytes | None) -> dict[str, Any]:
    """Contents of a JSON object; empty for what is none."""
    try:
        found = {} if content is None else json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _tokenizer_end(files: Mapping[str, bytes]) -> int | None:
    """The id of the tokenizer's own end token."""
    settings = read_object(files.get("tokenizer_config.json"))
    token = settings.get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        return None
    return next((number for known, number in _vocabulary(settings, files) if known == text), None)


def _vocabulary(settings: dict[str, Any], files: Mapping[str, bytes]) -> Iterator[tuple[str, int]]:
    """Added tokens first, then the vocabulary."""
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        if isinstance(token, dict) and isinstance(token.get("content"), str) and number.isdigit():
            yield token["content"], int(number)
    stored = read_object(files.get("tokenizer.json"))
    for token in stored.get("added_tokens") or ():
        if isinstance(token, dict) and type(token.get("id")) is int:
            yield str(token.get("content")), token["id"]
    model = stored.get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(words, dict):
        yield from ((word, number) for word, number in words.items() if type(number) is int)
    elif isinstance(words, list):  # unigram models: [[word, score], ...]
        yield from (
            (str(word[0]), number) for number, word in enumerate(words) if isinstance(word, list) and word
        )
