"""Work beside what its caller does."""

from __future__ import annotations

import threading

import pytest

from edkm_export.beside import Beside


def test_it_runs_meanwhile_and_gives_its_result():
    met = threading.Barrier(2, timeout=10)
    beside = Beside(lambda: (met.wait(), "done")[1])
    met.wait()  # would break if the call were made by its caller
    assert beside.result() == "done"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_what_it_raises_is_raised_where_it_is_waited_for(error):
    def fail():
        raise error

    with pytest.raises(type(error)):
        Beside(fail).result()
