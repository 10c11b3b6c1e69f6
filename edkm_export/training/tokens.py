"""Training data as one row of tokens, and the file that holds such a row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from edkm_export.atomic import atomic_file
from edkm_export.errors import InputError
from edkm_export.torch_archive import load_archive

__all__ = ["SUFFIX", "Tokens"]

SUFFIX = ".tokens"  # of files that hold tokens instead of text


class Tokens:
    """All documents in one row.

    Attributes:
        ids: int32 [tokens].
        counts: bool [tokens], whether predicting this token is part of the loss; None: all of them.
    """

    def __init__(self, ids: Tensor, counts: Tensor | None = None) -> None:
        assert ids.dim() == 1 and (counts is None or counts.shape == ids.shape)
        self.ids, self.counts = ids.to(torch.int32), counts

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def join(cls, parts: Sequence[Tokens]) -> Tokens:
        """Put several behind each other."""
        counts = None
        if any(part.counts is not None for part in parts):
            counts = torch.cat(
                [
                    torch.ones(len(part), dtype=torch.bool) if part.counts is None else part.counts
                    for part in parts
                ]
            )
        return cls(torch.cat([part.ids for part in parts]), counts)

    def sha256(self) -> str:
        """Of the tokens and of which count."""
        sha = hashlib.sha256(self.ids.numpy().tobytes())
        if self.counts is not None:
            sha.update(self.counts.numpy().tobytes())
        return sha.hexdigest()

    def sample(self, tokens: int, context: int) -> Tensor:
        """About so many tokens in windows from evenly spread places, at least one: int64 [windows, context]."""
        context = min(context, len(self))
        wanted = max(1, min(tokens, len(self)) // context)
        starts = torch.linspace(0, len(self) - context, wanted).long()
        return torch.stack([self.ids[start : start + context] for start in starts.tolist()]).long()

    def save(self, path: str | Path) -> None:
        """Write the ids, whole or not at all; that some do not count is not kept."""
        with atomic_file(path, overwrite=True) as temporary:
            torch.save({"ids": self.ids}, temporary)

    @classmethod
    def load(cls, path: str | Path) -> Tokens:
        """Read what `save` wrote.

        Raises:
            InputError: it is something else.
        """
        try:
            contents = load_archive(path, mapped=False)
            ids = contents["ids"]
            assert ids.dtype == torch.int32 and ids.dim() == 1 and len(ids) and int(ids.min()) >= 0
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such file.") from error
        except Exception as error:
            raise InputError(f"{path}: is not a file of tokens that edkm-export wrote.") from error
        return cls(ids)
