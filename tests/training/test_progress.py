"""The time of a run: all of it, but for evaluations and checkpoints."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from edkm_export.training import progress as module
from edkm_export.training.callbacks import Clock, Evaluate
from edkm_export.training.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when it is told to."""
    now = [100.0]

    def wait(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return wait


def test_time_between_steps_counts(clock):
    """A recorded step returns at once; the host waits for the device when it logs."""
    progress = Progress(steps=1000, seconds=10.0)
    callback, control = Clock(progress, None), SimpleNamespace(should_training_stop=False)
    arguments = SimpleNamespace(save_strategy="no")
    for step in range(1, 4):
        callback.on_step_begin(arguments, None, control)
        clock(0.5)
        callback.on_step_end(arguments, SimpleNamespace(global_step=step), control)
        clock(3.0)
    assert progress.elapsed == 0.5 + 2 * 3.5 and not control.should_training_stop
    callback.on_step_begin(arguments, None, control)
    callback.on_step_end(arguments, SimpleNamespace(global_step=4), control)
    assert progress.elapsed == 10.5 and control.should_training_stop and progress.share == 1.0


def test_an_evaluation_and_what_comes_before_the_first_step_do_not_count(clock):
    progress = Progress(steps=10)
    callback, control = Clock(progress, None), SimpleNamespace(should_training_stop=False)
    evaluation = Evaluate(1, lambda _step: clock(50.0), progress)
    clock(7.0)
    callback.on_step_begin(None, None, control)
    clock(1.0)
    callback.on_step_end(None, SimpleNamespace(global_step=1), control)
    clock(0.25)
    evaluation.on_step_end(None, SimpleNamespace(global_step=1), control)
    clock(0.5)
    callback.on_train_end(None, None, control)
    assert progress.elapsed == 1.75


def test_what_fails_inside_of_a_pause_does_not_count_either(clock):
    progress = Progress(steps=10)
    progress.start()
    with pytest.raises(OSError), progress.paused():
        clock(5.0)
        raise OSError
    clock(2.0)
    assert progress.lap() == 2.0
