"""Fewer cases by default, all of them with `-m slow` beside the default run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["sampled"]


def sampled(cases: Iterable[Any], every: int, first: int = 0, *, several: bool = False) -> list[Any]:
    """One case in `every`, from the one numbered `first` on; the others are slow.

    Args:
        cases: of one argument, or tuples.
        every: see above.
        first: see above.
        several: each case is a tuple of several arguments.
    """
    return [
        case
        if number % every == first
        else pytest.param(*(case if several else (case,)), marks=pytest.mark.slow)
        for number, case in enumerate(cases)
    ]
