"""What must hold for a rung to pass, and why."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EXECUTION", "MAX_PERPLEXITY_RATIO", "RATIO_WHY", "SIZE_TOLERANCE", "ExecutionThreshold"]

MAX_PERPLEXITY_RATIO = 2.0
"""Worst allowed perplexity of hard PyTorch, as a multiple of the original's."""

RATIO_WHY = "a doubled perplexity is one more bit of surprise a token: it is no longer the same model"

SIZE_TOLERANCE = 0.01
"""Allowed relative difference between the weights on disk and the prediction."""


@dataclass(frozen=True)
class ExecutionThreshold:
    """How close an executed artifact must be to hard PyTorch.

    Attributes:
        words: the precision, in words.
        top1: least share of positions with the same most likely token.
        median_kl: largest median KL divergence, in nats.
        why: the reason.
    """

    words: str
    top1: float
    median_kl: float
    why: str

    def __str__(self) -> str:
        return f"top-1 agreement at least {self.top1:.1%}, median KL at most {self.median_kl:g}"


EXECUTION = {
    "float32": ExecutionThreshold(
        "float32",
        0.999,
        1e-5,
        "both sides compute in float32, so only the order of sums differs; a wrong weight, table or op shows at once",
    ),
    "rounded": ExecutionThreshold(
        "float32 rounded to float16 after each op",
        0.99,
        1e-3,
        "rounding every result to float16 is the least that a phone does; an overflow or lost precision shows here",
    ),
}
"""By precision of the interpreter."""
