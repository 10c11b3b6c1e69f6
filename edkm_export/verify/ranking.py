"""Which palettized weights are the worst: one order for every table and plot."""

from __future__ import annotations

import math
from collections.abc import Iterable

from edkm_export.verify.report import TensorReport

__all__ = ["decibels", "ranked", "ranking_words"]


def ranked(rows: Iterable[TensorReport]) -> list[TensorReport]:
    """The worst first: those that are not bit-exact, then by the signal to noise ratio of `ranking_words`."""
    rows = list(rows)
    by_output = _has_outputs(rows)
    return sorted(rows, key=lambda row: (row.bit_exact is not False, _decibels(row, by_output)))


def ranking_words(rows: Iterable[TensorReport]) -> str:
    """The order and its unit, in sentences."""
    rows = list(rows)
    unit = "In decibels (dB): 10 dB less is ten times the error power; exact: no error at all."
    if _has_outputs(rows):
        return (
            "The worst first, by output SNR: the power of what the layer computes with the original weight, from the "
            f"original's own activations, over the power of the error that the decoded weight makes. {unit}"
        )
    if any(row.weight_snr_db is not None for row in rows):
        return (
            "The worst first, by weight SNR: the power of the original weight over that of the palettization error, "
            f"since no layer outputs were measured. {unit}"
        )
    return "In the order of the model: without the original there is nothing to rank them by."


def decibels(value: float | None) -> str:
    """A signal to noise ratio for people; empty: not measured."""
    if value is None:
        return ""
    return "exact" if value == math.inf else f"{value:.1f}"


def _has_outputs(rows: Iterable[TensorReport]) -> bool:
    return any(row.output_snr_db is not None for row in rows)


def _decibels(row: TensorReport, by_output: bool) -> float:
    found = row.output_snr_db if by_output else row.weight_snr_db
    return math.inf if found is None else found
