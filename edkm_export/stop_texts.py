"""Texts that end a generated one, wherever their tokens begin and end."""

from __future__ import annotations

from collections.abc import Sequence

from edkm_export.errors import InputError

__all__ = ["StopTexts"]


class StopTexts:
    """Lets a text through up to the first stop text, piece by piece.

    The end of a piece may be the beginning of a stop text; so much of it is held back. Of several the one that is
    complete first ends the text, so that the result does not depend on how the text is cut into pieces.

    Args:
        stops: texts, none of them empty; none at all: everything passes.

    Attributes:
        found: the one that ended the text; None: none has yet.

    Raises:
        InputError: one is empty.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        if not all(stops):
            raise InputError("--stop: is empty, which would end every text before it begins.")
        self._stops = sorted(stops, key=len, reverse=True)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Add a piece; what is certain to come before a stop text."""
        if self.found is not None:
            return ""
        held = self._held + text
        ends = [(held.index(stop) + len(stop), stop) for stop in self._stops if stop in held]
        if ends:
            end, self.found = min(
                ends, key=lambda each: each[0]
            )  # of equal ends the longest, which comes first
            self._held = ""
            return held[: end - len(self.found)]
        kept = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]

    def finish(self) -> str:
        """What was held back and turned out to be no stop text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that begins a stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
