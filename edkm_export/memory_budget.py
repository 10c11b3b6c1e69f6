"""How much memory the weights of a model may take while it is run."""

from __future__ import annotations

from dataclasses import dataclass

from edkm_export.machine import available_memory
from edkm_export.quantities import short_size

__all__ = ["MemoryBudget", "room_if_needed"]

_PROCESS_BYTES = 1_000_000_000  # interpreter, torch, transformers, and what a run needs beside weights


def room_if_needed(values: int, room_bytes: int | None) -> int | None:
    """The room that weights have, if it is a limit for so many of them in float32; None: they fit, or have no limit."""
    return None if room_bytes is None or 4 * values <= room_bytes else room_bytes


@dataclass(frozen=True)
class MemoryBudget:
    """Memory for a command.

    Attributes:
        total_bytes: for everything.
        asked: whether the user named it; else it is what is there.
    """

    total_bytes: int
    asked: bool = False

    @classmethod
    def of(cls, asked_bytes: int | None) -> MemoryBudget:
        """What the user asks for; None: what is free on this machine, and what this process has of it."""
        if asked_bytes is not None:
            return cls(asked_bytes, asked=True)
        import psutil

        return cls(available_memory()[1] + psutil.Process().memory_info().rss)

    def room_bytes(self, *, reserved_bytes: int = 0, models: int = 1) -> int:
        """What the weights of each model may take, when so many are in memory at once; 0 when nothing is left.

        Args:
            reserved_bytes: for other things than weights and the process itself.
            models: that are in memory at once.
        """
        return max(0, self.total_bytes - _PROCESS_BYTES - reserved_bytes) // models

    def __str__(self) -> str:
        """In words, for a report."""
        return f"{short_size(self.total_bytes)} {'asked for (--memory)' if self.asked else 'were there'}"
