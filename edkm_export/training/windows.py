"""Windows of training tokens: documents end to end, cut at a different place in each pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from edkm_export.errors import InputError
from edkm_export.training.tokens import Tokens

__all__ = ["PackedWindows", "check_length"]


def check_length(tokens: int, context: int, source: str) -> None:
    """Refuse data that does not fill one window.

    Raises:
        InputError: it does not; the message names `source`.
    """
    if tokens < context:
        raise InputError(
            f"{source}: {tokens} tokens, but a window takes {context}; give more text, or a smaller --context."
        )


class PackedWindows(Dataset[dict[str, Tensor]]):
    """Sample i is a function of the seed and i alone, so that training can be resumed at any of them.

    Each pass over the tokens starts at a random place of the row, which is taken as a ring, and visits its
    windows in a random order: the same text is never cut twice at the same borders.
    """

    def __init__(
        self, tokens: Tokens, *, context: int, samples: int, seed: int, source: str = "training data"
    ) -> None:
        check_length(len(tokens), context, source)
        self.tokens, self.context, self.samples, self.seed = tokens, context, samples, seed
        self.windows = len(tokens) // context
        self._pass: tuple[int, int, Tensor] | None = None

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        """Sample `sample`: {"input_ids": int64 [context], "counts": bool [context] if some tokens do not count}."""
        turn, place = divmod(sample, self.windows)
        if self._pass is None or self._pass[0] != turn:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
            offset = int(torch.randint(len(self.tokens), (1,), generator=generator))
            self._pass = (turn, offset, torch.randperm(self.windows, generator=generator))
        _, offset, order = self._pass
        start = (offset + int(order[place]) * self.context) % len(self.tokens)
        found = {"input_ids": self._cut(self.tokens.ids, start).long()}
        if self.tokens.counts is not None:
            found["counts"] = self._cut(self.tokens.counts, start)
        return found

    def _cut(self, row: Tensor, start: int) -> Tensor:
        end = start + self.context
        if end <= len(row):
            return row[start:end]
        return torch.cat([row[start:], row[: end - len(row)]])
