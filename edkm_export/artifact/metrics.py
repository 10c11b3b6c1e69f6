"""Measures of how far apart two models are on a text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Annotated

import pydantic
import torch
from torch import Tensor

from edkm_export.artifact.thresholds import NEAR_TIE_NATS

__all__ = [
    "KL_DECADES",
    "Divergence",
    "Number",
    "Perplexity",
    "Positions",
    "Record",
    "compare_positions",
    "divergence",
    "perplexity",
    "snr_db",
    "summarize",
    "token_losses",
]

KL_DECADES = (-12, 2)
"""Powers of ten between which `Divergence.kl_histogram` counts, in half decades."""


_ENTRIES_AT_ONCE = 1 << 20
"""Logits that are compared at once, in float64: what a cache holds, not gigabytes."""


class Record(pydantic.BaseModel):
    """A frozen part of a report."""

    # Infinity is a legal measurement (an output that is not finite); JSON has no number for it.
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


Number = Annotated[
    float,
    pydantic.WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": ["Infinity", "-Infinity", "NaN"]}]}),
]
"""A number that may not be finite, and is then a string in the JSON."""


class Perplexity(Record):
    """Perplexity of a model on the evaluation text."""

    value: Number
    standard_error: Number
    tokens: int


class Divergence(Record):
    """Distance between the next-token distributions of two models; KL in nats.

    Attributes:
        tokens: positions that were compared.
        kl_mean: of KL(reference || candidate) over the positions.
        kl_median: likewise.
        kl_p999: its 99.9th percentile.
        kl_max: the largest.
        top1_agreement: share of positions with the same most likely token.
        near_ties: disagreements on it at which the reference holds both tokens equally likely.
        kl_histogram: positions by KL, in half decades from 1e-12 to 100 nats; the first and the last count what is
            beyond.
    """

    tokens: int
    kl_mean: Number
    kl_median: Number
    kl_p999: Number
    kl_max: Number
    top1_agreement: Number
    near_ties: int
    kl_histogram: list[int] = []

    @property
    def settled_agreement(self) -> float:
        """Top-1 agreement, near ties counted as agreeing."""
        return self.top1_agreement + self.near_ties / self.tokens


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Negative log likelihood of each next token.

    Args:
        logits: float [positions, vocab_size].
        tokens: int64 [positions].

    Returns:
        float64 [positions - 1], in nats.
    """
    return torch.nn.functional.cross_entropy(logits[:-1].float(), tokens[1:], reduction="none").double()


def perplexity(losses: Iterable[Tensor]) -> Perplexity:
    """Perplexity over all tokens, with its standard error.

    Args:
        losses: float [tokens] of each window, in nats.

    Returns:
        exp of the mean; the standard error is that of the mean carried through exp, tokens taken as independent.
    """
    values = torch.cat(list(losses)).double()
    mean = float(values.mean())
    spread = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value=value, standard_error=value * spread, tokens=len(values))


@dataclass(frozen=True)
class Positions:
    """Distance between two next-token distributions at each position of a window.

    Attributes:
        kl: float64 [positions], KL(reference || candidate) in nats.
        agree: bool [positions], both have the same most likely token.
        ties: bool [positions], they do not, but the reference holds both tokens equally likely.
    """

    kl: Tensor
    agree: Tensor
    ties: Tensor


def compare_positions(reference: Tensor, candidate: Tensor) -> Positions:
    """Compare next-token distributions, position by position.

    Args:
        reference: logits, float [positions, vocab_size].
        candidate: likewise. Logits that are not finite count as infinitely far and as disagreeing.
    """
    rows = max(1, _ENTRIES_AT_ONCE // reference.shape[-1])
    parts = [
        _compare_rows(*pair)
        for pair in zip(torch.split(reference, rows), torch.split(candidate, rows), strict=True)
    ]
    return Positions(*(torch.cat([getattr(part, each.name) for part in parts]) for each in fields(Positions)))


def _compare_rows(reference: Tensor, candidate: Tensor) -> Positions:
    p = reference.double().log_softmax(-1)
    q = candidate.double().log_softmax(-1)
    finite = torch.isfinite(candidate).all(-1)
    best, chosen = p.argmax(-1, keepdim=True), candidate.argmax(-1, keepdim=True)
    agree = (best == chosen)[:, 0] & finite
    gap = (p.gather(-1, best) - p.gather(-1, chosen))[:, 0]
    kl = q.neg_().add_(p).mul_(p.exp_()).sum(-1)
    return Positions(
        kl=torch.where(finite & ~kl.isnan(), kl.clamp_min(0), torch.inf),
        agree=agree,
        ties=~agree & finite & (gap <= NEAR_TIE_NATS),
    )


def divergence(pairs: Iterable[tuple[Tensor, Tensor]]) -> Divergence:
    """Compare next-token distributions over windows.

    Args:
        pairs: (reference, candidate) logits, float [positions, vocab_size], of each window.

    Returns:
        KL(reference || candidate) in nats (mean, median, 99.9th percentile, maximum), top-1 agreement, and how many
        of the disagreements are near ties: the reference holds both tokens equally likely, within NEAR_TIE_NATS. A
        candidate that is not finite counts as infinitely far and as disagreeing.
    """
    return summarize(compare_positions(reference, candidate) for reference, candidate in pairs)


def summarize(windows: Iterable[Positions]) -> Divergence:
    """The same of windows that were compared already."""
    parts = list(windows)
    kl, agree, ties = (torch.cat([getattr(part, name) for part in parts]) for name in ("kl", "agree", "ties"))
    ordered = kl.sort().values
    return Divergence(
        tokens=len(kl),
        kl_mean=float(kl.mean()),
        kl_median=float(ordered[len(ordered) // 2]),
        kl_p999=float(ordered[min(len(ordered) - 1, math.ceil(0.999 * len(ordered)) - 1)]),
        kl_max=float(ordered[-1]),
        top1_agreement=float(agree.double().mean()),
        near_ties=int(ties.sum()),
        kl_histogram=_half_decades(kl),
    )


def _half_decades(kl: Tensor) -> list[int]:
    """Count values by their logarithm; zeros in the first bin, infinities in the last."""
    low, high = KL_DECADES
    bins = ((kl.log10() - low) * 2).floor().clamp(0, 2 * (high - low) - 1).long()
    return torch.bincount(bins, minlength=2 * (high - low)).tolist()


def snr_db(reference: Tensor, candidate: Tensor) -> float:
    """Signal to noise ratio of a tensor in decibels; infinity when equal."""
    signal = float(reference.double().square().sum())
    noise = float((reference.double() - candidate.double()).square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
