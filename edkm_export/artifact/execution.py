"""The ways to run an artifact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from edkm_export.artifact.thresholds import ExecutionThreshold
from edkm_export.errors import InputError, PackageError
from edkm_export.kv_cache import HeldCache

__all__ = ["AT_FAULT", "DAMAGED", "Execute", "ExecuteHeld", "Execution", "Together"]

Execute = Callable[[Tensor], Tensor]
"""int64 [positions] -> logits float32 [positions, vocab_size]."""

ExecuteHeld = Callable[[Tensor], tuple[Tensor, HeldCache]]
"""The same, with the int8 keys and values that the logits were computed from."""


@runtime_checkable
class Together(Protocol):
    """An `Execute` that runs several texts for little more than one, since they share the reading of the weights."""

    def together(self, texts: Sequence[Tensor]) -> list[Tensor]:
        """What it gives for each of the texts."""


AT_FAULT = (PackageError, InputError)
"""What an execution raises when the artifact is at fault: the tokens that the verifier feeds are sound, so that even an
index out of range is the artifact's."""

DAMAGED = "the artifact cannot be read"


@dataclass(frozen=True)
class Execution:
    """One way to run an artifact; one rung of the ladder.

    Attributes:
        id: stable name of the rung, such as "execution-float32".
        words: what is run, for people, such as "executed artifact, float32".
        threshold: how close to hard PyTorch it must be.
        execute: int64 [positions] -> logits float32 [positions, vocab_size] of a text that starts at position 0;
            raises PackageError when the artifact is at fault. None: it cannot be run here.
        missing: why not, when `execute` is None.
        positions: so many positions of the text alone are run; None: all of it.
        apart: it runs in a process of its own, on one core, and may do so beside others.
        held: the same as `execute`, of an artifact that holds keys and values as int8; None of any other.
    """

    id: str
    words: str
    threshold: ExecutionThreshold
    execute: Execute | None
    missing: str = ""
    positions: int | None = None
    apart: bool = False
    held: ExecuteHeld | None = None
