"""Several runs of one model that share its passes over the weights: each waits at a layer until all have come to it.

A run is an ordinary function that calls the model; it is given a thread of its own, but only one of them works at any
time. So transformers' own forward pass is executed as it is, whole or token by token, and a layer that does not stay in
memory is read once for all runs.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

__all__ = ["Turns"]

_T = TypeVar("_T")


class _Abandoned(BaseException):
    """Ends a run whose result nobody waits for any more."""


class Turns(Generic[_T]):
    """Runs that take turns.

    Args:
        load: brings a block of weights into memory; the one before may be dropped.
        blocks: how many there are; they are numbered in the order in which a forward pass needs them.
        runs: called without arguments; they may not start threads that use the model.
    """

    _own = threading.local()

    def __init__(self, load: Callable[[int], None], blocks: int, runs: Sequence[Callable[[], _T]]) -> None:
        self._load, self._blocks = load, blocks
        grad = torch.is_grad_enabled()
        self._runs = [_Run(run, grad) for run in runs]

    @classmethod
    def current(cls) -> _Run[Any] | None:
        """The run that this thread belongs to; None: none."""
        return getattr(cls._own, "run", None)

    def results(self) -> list[_T]:
        """Run all of them.

        Returns:
            What they return, in their order.

        Raises:
            Exception: what a run raised; the others are ended then.
        """
        last = -1
        try:
            for run in self._runs:
                run.start()
                self._resume(run)
            while waiting := [run for run in self._runs if run.wanted is not None]:
                # in the order of a pass, from where the last one was: runs that are a token apart meet again
                last = min(
                    (run.wanted for run in waiting if run.wanted is not None),
                    key=lambda block: (block <= last, block),
                )
                self._load(last)
                for run in self._runs:
                    while run.wanted == last:
                        self._resume(run)
            return [run.result() for run in self._runs]
        finally:
            for run in self._runs:
                run.abandon()

    @staticmethod
    def _resume(run: _Run[_T]) -> None:
        run.resume()
        if run.error is not None:
            raise run.error


class _Run(Generic[_T]):
    """One run and its thread."""

    def __init__(self, function: Callable[[], _T], grad: bool) -> None:
        self._function, self._grad = function, grad
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._ends = self._started = False
        self._result: list[_T] = []
        self.wanted: int | None = None
        self.error: BaseException | None = None
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._work,), daemon=True)

    def start(self) -> None:
        """Begin; nothing is done before the first turn."""
        self._thread.start()
        self._started = True

    def resume(self) -> None:
        """Go on until the next block is wanted, or to the end."""
        self.wanted = None
        self._turn.release()
        self._back.acquire()

    def wait_for(self, block: int) -> None:
        """Called in the run itself: give the turn back until the block is in memory."""
        self.wanted = block
        self._back.release()
        self._take_turn()

    def result(self) -> _T:
        """What the function returned."""
        return self._result[0]

    def abandon(self) -> None:
        """End it where it waits; nothing happens to one that is through."""
        if self._started and self._thread.is_alive():
            self._ends = True
            self._turn.release()
            self._thread.join()

    def _take_turn(self) -> None:
        self._turn.acquire()
        if self._ends:
            raise _Abandoned

    def _work(self) -> None:
        Turns._own.run = self
        try:
            self._take_turn()
            with torch.set_grad_enabled(self._grad):
                self._result.append(self._function())
        except _Abandoned:
            pass
        except BaseException as error:  # it is raised again where the results are asked for
            self.error = error
        finally:
            self._back.release()
