"""Text that appears while its tokens are being generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edkm_export.errors import InputError

__all__ = ["TextStream"]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns tokens into text, one after the other.

    A token can be a part of a character, and what a token reads as can depend on those before it: a space that is
    dropped at the beginning of a text, a run of bytes that is decoded as a whole. So a short window of tokens is
    decoded again for each new one, and text is held back while it ends in the middle of a character. A character that
    the prompt began and the answer completes belongs to the answer.

    Args:
        tokenizer: a transformers tokenizer.
        prompt: tokens before the generated ones.

    Raises:
        InputError: the tokenizer cannot decode its own tokens; `push` and `finish` raise it too.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        before = list(prompt[self._window(prompt) :])
        whole = len(before)
        while whole and self._decode(before[:whole]).endswith(_REPLACEMENT):
            whole -= 1
        self._shown = before[:whole]  # tokens whose text is out already
        self._held = before[whole:]  # tokens behind them
        self._has_answer = False

    def push(self, token: int) -> str:
        """Add a token.

        Returns:
            Text that is certain now; empty while a character is incomplete.
        """
        self._held.append(token)
        self._has_answer = True
        text = self._pending()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._shown, self._held = self._held, []
        return text

    def finish(self) -> str:
        """Text that was held back; an incomplete character comes out as U+FFFD."""
        text = self._pending() if self._held and self._has_answer else ""
        self._shown, self._held = self._shown + self._held, []
        return text

    def _window(self, prompt: Sequence[int]) -> int:
        """Where to begin in a prompt: at a whole character, with some text before the answer."""
        start = len(prompt)
        while start:
            start -= 1
            if _REPLACEMENT not in self._decode([prompt[start]]) and self._decode(list(prompt[start:])):
                break
        return start

    def _pending(self) -> str:
        before = self._decode(self._shown)
        return self._decode(self._shown + self._held)[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        if not tokens:
            return ""
        try:
            text: str = self._tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        except Exception as error:  # a tokenizer is a program, with errors of its own
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise InputError(f"the tokenizer cannot decode its own tokens {tokens[-3:]}: {first}") from error
        return text
