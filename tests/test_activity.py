from __future__ import annotations

import pytest

from edkm_export.activity import Activity, activity, tracked, watched_by


class Notes:
    """A watcher that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, float]] = []

    def began(self, activity: Activity) -> None:
        self.told.append(("began", activity.words, activity.done))

    def renamed(self, activity: Activity) -> None:
        self.told.append(("renamed", activity.words, activity.done))

    def ended(self, activity: Activity) -> None:
        self.told.append(("ended", activity.words, activity.done))


def test_nothing_happens_without_a_watcher():
    with activity("reading", 3) as reading:
        reading.advance()
        reading.rename("writing")
    assert list(tracked("ab", "letters")) == ["a", "b"]


def test_watcher_is_told_in_order():
    notes = Notes()
    with watched_by(notes), activity("outer") as outer:
        assert list(tracked(range(2), "inner")) == [0, 1]
        outer.rename("second half")
    assert notes.told == [
        ("began", "outer", 0),
        ("began", "inner", 0),
        ("ended", "inner", 2),
        ("renamed", "second half", 0),
        ("ended", "second half", 0),
    ]


def test_an_error_ends_it():
    notes = Notes()
    with pytest.raises(ValueError), watched_by(notes), activity("reading"):
        raise ValueError
    assert [kind for kind, *_ in notes.told] == ["began", "ended"]


def test_a_loop_that_is_left_early_ends_it():
    notes = Notes()
    with watched_by(notes):
        for _ in tracked(range(5), "counting"):
            break
    assert notes.told == [("began", "counting", 0), ("ended", "counting", 0)]


@pytest.mark.parametrize(
    ("total", "done", "share"), [(4, 1, 0.25), (4, 9, 1.0), (4, -1, 0.0), (None, 3, None), (0, 0, None)]
)
def test_share_is_never_beyond_the_whole(total, done, share):
    assert Activity("x", total, done=done).share == share


def test_total_of_something_without_a_length():
    with watched_by(notes := Notes()):
        assert list(tracked(iter("abc"), "letters", total=3)) == ["a", "b", "c"]
    assert notes.told[-1] == ("ended", "letters", 3)
