"""Work that goes on beside what its caller does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Beside"]

_T = TypeVar("_T")


class Beside(Generic[_T]):
    """A call in a thread of its own, which does not hold up the end of the process.

    Args:
        call: what is done; its activities are not shown, since somebody else's are.
    """

    def __init__(self, call: Callable[[], _T]) -> None:
        self._call = call
        self._found: list[_T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def result(self) -> _T:
        """What the call returns, once it has; whatever it raises is raised here."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found[0]

    def _run(self) -> None:
        try:
            self._found.append(self._call())
        except BaseException as error:  # it belongs to whoever waits
            self._error = error
