"""300 hostile inputs, the same each time: no traceback, hang, signal, memory without bounds, or foreign code.

`make fuzz MINUTES=30` tries others; what it finds becomes a case of test_findings.py.
"""

from __future__ import annotations

import pytest

from tests.hostile.fuzzing import fuzz_case, prepare
from tests.hostile.readers import READERS, Seeds

CASES = 34
"""Of each of nine readers; Core AI's, which is installed apart, comes on top."""

_WHOLE = 6
"""One in so many is also converted, continued or verified, which takes a second; the others are read and shown."""


@pytest.fixture(scope="session")
def seeds(tmp_path_factory) -> Seeds:
    return prepare(tmp_path_factory.mktemp("seeds"))


@pytest.mark.parametrize("reader", READERS)
def test_hostile_inputs(reader: str, seeds: Seeds, tmp_path) -> None:
    if reason := READERS[reader].available():
        pytest.skip(reason)
    found = []
    for number in range(CASES):
        words, outcome = fuzz_case(reader, number, seeds, tmp_path, whole=number % _WHOLE == 0)
        if outcome.faults:
            found.append(
                f"--reader {reader} --number {number} ({words!a}): {outcome.faults!a}\n{outcome.text[-800:]!a}"
            )
    assert not found, "python -m tests.hostile.fuzzing with\n" + "\n".join(found)
