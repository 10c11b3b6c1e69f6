"""Faults to plant in artifacts: what the verifier must find, and what it must not mind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edkm_export.checkpoint import Checkpoint

__all__ = ["Mutation"]


@dataclass(frozen=True)
class Mutation:
    """A change of an artifact on disk.

    Attributes:
        kind: bytes, ops, attributes, names, shapes, states or order.
        name: what is changed, in words.
        apply: makes the change to a copy; takes its path and the checkpoint.
        harmful: it changes the computed function, or what the artifact says of itself; False: the verifier must
            not mind.
        module: what localization must name, where that is claimed.
    """

    kind: str
    name: str
    apply: Callable[[Path, Checkpoint], None]
    harmful: bool = True
    module: str | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"
