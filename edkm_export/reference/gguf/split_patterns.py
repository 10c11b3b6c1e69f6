"""How byte-level tokenizers split a text before they merge, by the names of `tokenizer.ggml.pre`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SPLITS", "Split"]

_ENGLISH = r"'s|'t|'re|'ve|'m|'ll|'d"
_ANY_CASE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = _ENGLISH + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _ANY_CASE + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _ANY_CASE + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST_WITH_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _words_by_case(ending: str, digits: str) -> str:
    begin = r"[^\r\n\p{L}\p{N}]?"
    words = f"{begin}{_UPPER}*{_LOWER}+{ending}|{begin}{_UPPER}+{_LOWER}*{ending}"
    return f"{words}|{digits}{_REST_WITH_SLASH}"


@dataclass(frozen=True)
class Split:
    """What a name stands for.

    Attributes:
        patterns: each splits what the one before left.
        whole_words: a word that is in the vocabulary is not put together from merges.
        begins: a text begins with the token for it, unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    begins: bool = False


_OF_LLAMA3 = Split((_LLAMA3,), whole_words=True, begins=True)
_OF_QWEN2 = Split((_QWEN2,))
_OF_GPT4O = Split((_words_by_case(f"{_ANY_CASE}?", r"\p{N}{1,3}"),))

SPLITS = {
    "dbrx": Split((_LLAMA3,)),
    "deepseek-r1-qwen": _OF_QWEN2,
    "falcon3": _OF_LLAMA3,
    "gpt-2": Split((_GPT2,)),
    "gpt-4o": _OF_GPT4O,
    "llama-bpe": _OF_LLAMA3,
    "llama-v3": _OF_LLAMA3,
    "llama3": _OF_LLAMA3,
    "qwen2": _OF_QWEN2,
    "smaug-bpe": Split((_LLAMA3,)),
    "smollm": Split((r"\p{N}", _GPT2)),
    "tekken": Split((_words_by_case("", r"\p{N}"),), whole_words=True, begins=True),
}
"""{name: how it splits}; each is compared with llama.cpp in the tests."""
