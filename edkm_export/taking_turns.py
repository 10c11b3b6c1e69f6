"""Objects that several threads may use, one after the other."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["taking_turns"]

_Method = TypeVar("_Method", bound=Callable[..., Any])
_LOCK = "_turn"


def taking_turns(method: _Method) -> _Method:
    """Let a thread wait while another one is in a method of the same object that is marked so.

    A session counts the tokens that it was fed: two threads that feed it at once would lose some without a word.
    """

    @functools.wraps(method)
    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        # setdefault is one step of the interpreter, so that two threads get one lock; a method may call another
        with self.__dict__.setdefault(_LOCK, threading.RLock()):
            return method(self, *arguments, **options)

    return run  # type: ignore[return-value]
