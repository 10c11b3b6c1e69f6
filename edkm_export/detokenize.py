"""Text that appears while its tokens are being generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["TextStream"]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns tokens into text, one after the other.

    A token can be a part of a character, and what a token reads as can depend on the one before it (a space that is
    dropped at the beginning of a text). So a short window of tokens is decoded again for each new one, and text is
    held back while it ends in the middle of a character.

    Args:
        tokenizer: a transformers tokenizer.
        prompt: tokens before the generated ones.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._shown = list(prompt[-1:])  # tokens whose text is out already
        self._held: list[int] = []  # tokens behind them

    def push(self, token: int) -> str:
        """Add a token.

        Returns:
            Text that is certain now; empty while a character is incomplete.
        """
        self._held.append(token)
        text = self._pending()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._shown, self._held = self._held, []
        return text

    def finish(self) -> str:
        """Text that was held back; an incomplete character comes out as U+FFFD."""
        text = self._pending() if self._held else ""
        self._shown, self._held = self._shown + self._held, []
        return text

    def _pending(self) -> str:
        before = self._decode(self._shown)
        return self._decode(self._shown + self._held)[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
