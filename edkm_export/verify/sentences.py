"""The texts that an embedding model is verified with: questions, and what may answer them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edkm_export.embedding_settings import Role
from edkm_export.errors import InputError

__all__ = ["LEAST_TEXTS", "Sentence", "read_sentences"]

LEAST_TEXTS = 4
"""Fewer have no order that could be compared."""

_ROLES: tuple[Role, ...] = ("query", "document")


@dataclass(frozen=True)
class Sentence:
    """One text.

    Attributes:
        text: without a prompt.
        role: whose prompt of the model it gets; None: none, and it is both a query and a document.
    """

    text: str
    role: Role | None = None


def read_sentences(text: str, name: str) -> list[Sentence]:
    """One text a line; a line may begin with its role and a tab, "query" or "document".

    Raises:
        InputError: there are too few.
    """
    found = list(_parse(text))
    if len(found) < LEAST_TEXTS:
        raise InputError(
            f"{name}: has {len(found)} line{'' if len(found) == 1 else 's'} with text, and an embedding model is "
            f"verified with {LEAST_TEXTS} or more: one text a line."
        )
    return found


def _parse(text: str) -> Iterator[Sentence]:
    for line in text.splitlines():
        role, tab, rest = line.partition("\t")
        known = next((each for each in _ROLES if tab and each == role.strip()), None)
        content = (rest if known else line).strip()
        if content:
            yield Sentence(content, known)
