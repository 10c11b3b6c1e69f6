"""Sessions that two threads use: no token is lost, and each is counted once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edkm_export.api.artifacts import open_session
from edkm_export.checkpoint import load
from edkm_export.reference.torch_session import TorchSession
from edkm_export.taking_turns import taking_turns

EACH = 20


class Counter:
    """Loses counts when two threads are in `add` at once."""

    def __init__(self) -> None:
        self.count = 0

    @taking_turns
    def add(self) -> None:
        before = self.count
        time.sleep(0.0005)
        self.count = before + 1
        self.look()

    @taking_turns
    def look(self) -> int:
        return self.count


def together(work: Callable[[], object]) -> None:
    """In two threads at once, `EACH` times each."""
    begin, errors = threading.Barrier(2), []

    def run() -> None:
        begin.wait()
        try:
            for _ in range(EACH):
                work()
        except Exception as error:  # of a thread, told here
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_one_thread_waits_for_the_other() -> None:
    counter, other = Counter(), Counter()
    together(counter.add)
    assert counter.count == 2 * EACH and other.count == 0


def used(session: object) -> int:
    return int(session._used)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["coreml", "onnx", "torch"])
def test_a_session_counts_every_token(kind: str, small_export, onnx_folder) -> None:
    if kind == "torch":
        session = TorchSession.of(load(small_export.model))
    else:
        folder: Path = small_export.bundle if kind == "coreml" else onnx_folder("exact")
        session, _ = open_session(folder)
    together(lambda: session.feed([3]))
    assert used(session) == 2 * EACH
    assert session.feed([4]).shape[0] == 1
