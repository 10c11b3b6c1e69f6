"""What comes of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edkm_export.training.evaluation import Evaluation

__all__ = ["Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What a run produced.

    Attributes:
        path: the checkpoint.
        steps, tokens, seconds: how long it trained.
        average_bits: over the decoder's layers, LUTs included.
        all_bits: over all weights, everything that is stored included.
        evaluations: {text: {"original", "one-shot", "trained": Evaluation}}.
    """

    path: Path
    steps: int
    tokens: int
    seconds: float
    average_bits: float
    all_bits: float
    evaluations: dict[str, dict[str, Evaluation]]
