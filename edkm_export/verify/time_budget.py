"""A limit of the time that a verification takes: fewer tokens are compared then, and what was left out is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from edkm_export.activity import tracked
from edkm_export.artifact.execution import Execute, Together
from edkm_export.verify.report import Rung, TimeBudget, Verdict

__all__ = ["DECODED", "UNLIMITED", "WINDOW", "Budget", "Share", "cuts", "run_windows"]

_T = TypeVar("_T")

WINDOW = 128
"""Tokens of a window at most where the time is limited: the work can only stop between two of them."""

DECODED = 32
"""Tokens that are decoded one by one; a fault of the cache shows within a few."""


class Budget:
    """Shares the time out among the stages that are still to come, evenly: what one does not use, the next ones have.

    Args:
        minutes: for everything; None: no limit.
        clock: seconds that pass.
    """

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.minutes, self._clock = minutes, clock
        self._end = None if minutes is None else clock() + 60 * minutes
        self._stages = 1

    def expect(self, stages: int) -> None:
        """So many stages will ask for a share."""
        self._stages = max(1, stages)

    @property
    def is_over(self) -> bool:
        """Whether all of the time is used up."""
        return self._end is not None and self._clock() >= self._end

    @property
    def spent(self) -> str:
        """Why something that comes after the end is not run."""
        return (
            ""
            if self.minutes is None
            else f"the time budget was used up before (--minutes {self.minutes:g}); give it more minutes"
        )

    def share(self) -> Share:
        """That of the next stage."""
        if self._end is None:
            return Share(None, self._clock)
        now = self._clock()
        left, self._stages = max(0.0, self._end - now), max(1, self._stages)
        found = Share(now + left / self._stages, self._clock)
        self._stages -= 1
        return found


class Share:
    """What one stage may take.

    Args:
        end: when it ends, on this clock; None: never.
        clock: seconds that pass.
    """

    def __init__(self, end: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._end, self._clock = end, clock

    def waves(self, items: Sequence[_T]) -> Iterator[Sequence[_T]]:
        """The same for items that are cheaper together: one, and then twice as many each time.

        Without a limit all of them at once. A wave may take twice as long as the one before.
        """
        if self._end is None:
            yield items
            return
        place, size, took = 0, 1, 0.0
        while place < len(items):
            started = self._clock()
            if place and started + 2 * took > self._end:
                return
            yield items[place : place + size]
            place, size, took = place + size, 2 * size, self._clock() - started

    def within(self, items: Iterable[_T]) -> Iterable[_T]:
        """As many of the items as there is time for, by what those before took; the first in any case."""
        started = self._clock()
        for count, item in enumerate(items):
            if count and self._end is not None:
                now = self._clock()
                if now + (now - started) / count > self._end:
                    return
            yield item


UNLIMITED = Share(None)
"""All of the time that there is."""


def run_windows(execute: Execute, windows: Sequence[Tensor] | Tensor, share: Share) -> list[Tensor]:
    """Logits of as many windows as there is time for, of the first in any case.

    Returns:
        float32 [positions, vocab_size] of each.
    """
    held: object = execute
    if isinstance(held, Together):
        with torch.no_grad():
            return [one for wave in share.waves(list(windows)) for one in held.together(wave)]
    counted = tracked(windows, "evaluation text", "windows")
    with torch.no_grad():
        return [execute(window) for window in share.within(counted)]


def cuts(
    budget: Budget,
    rungs: Sequence[Rung],
    tokens: int,
    prompts: int,
    localize: bool,
    positions: Mapping[str, int] | None = None,
) -> TimeBudget | None:
    """What the budget left out.

    Args:
        budget: of the time; None comes of one without a limit.
        rungs: what came of each comparison.
        tokens: that each model should have run.
        prompts: that should have been continued.
        localize: whether faults should have been looked for.
        positions: tokens of those executions, by id, that never run more.
    """
    if budget.minutes is None:
        return None
    found = []
    for rung in rungs:
        if rung.verdict is Verdict.NOT_RUN:
            found += [f"{rung.candidate}: not run"] if rung.detail == budget.spent else []
            continue
        most = (positions or {}).get(rung.id, tokens)
        done, wanted, unit = rung.measures.get("tokens"), min(tokens, most), "tokens"
        if rung.id == "prefill-decode":
            wanted = min(DECODED, tokens)
        elif rung.id.startswith("continuation"):
            done, wanted, unit = len(rung.measures.get("continuations", ())), prompts, "prompts"
        elif rung.id != "palettization" and not rung.id.startswith("execution-"):
            continue
        if done is not None and done < wanted:
            found.append(f"{rung.candidate}: {done:,} of {wanted:,} {unit} compared")
    if localize and budget.is_over and any(rung.verdict is Verdict.FAIL for rung in rungs):
        found.append("looking for the first value that is off: not run")
    return TimeBudget(minutes=budget.minutes, cut=found)
