"""How far a run has come, in steps and in seconds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from edkm_export.training.train_config import TrainConfig

__all__ = ["Progress"]

_UNLIMITED = 10_000_000  # steps of a run that only time ends


@dataclass
class Progress:
    """How much of a run is done, by whichever limit is nearest.

    Seconds are those of the wall clock, pauses excluded: a recorded step returns before the device is done with it,
    so that the time inside of steps says little.

    Attributes:
        steps: limit in optimizer steps.
        seconds: limit in seconds of training, None for none.
        step: steps that are done.
        elapsed: seconds that are done, those before a resume included.
    """

    steps: int
    seconds: float | None = None
    step: int = 0
    elapsed: float = 0.0
    _since: float | None = field(default=None, repr=False)
    _counted: float = field(default=0.0, repr=False)

    @classmethod
    def limited(cls, config: TrainConfig, tokens: int) -> Progress:
        """Nothing done yet of what the settings ask for, or of one pass over `tokens` if they ask for nothing."""
        limits = [] if config.steps is None else [config.steps]
        if config.tokens is not None:
            limits.append(max(1, config.tokens // config.step_tokens))
        if not limits and config.minutes is None:
            limits.append(max(1, tokens // config.step_tokens))
        seconds = None if config.minutes is None else config.minutes * 60
        return cls(steps=min(limits, default=_UNLIMITED), seconds=seconds)

    @property
    def share(self) -> float:
        """From 0 to 1."""
        by_time = self.elapsed / self.seconds if self.seconds else 0.0
        return min(1.0, max(self.step / self.steps, by_time))

    def start(self) -> None:
        """Begin to count, unless that was done."""
        if self._since is None:
            self._since = time.monotonic()

    def lap(self) -> float:
        """Seconds since the last lap or the start."""
        now = time.monotonic()
        taken = self._counted + (now - self._since if self._since is not None else 0.0)
        self._since, self._counted = now, 0.0
        return taken

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do something that does not count, once the device has done what does."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        self._counted = self.lap()
        try:
            yield
        finally:
            self._since = time.monotonic()
