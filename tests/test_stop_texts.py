from __future__ import annotations

import random

import pytest

from edkm_export.errors import InputError
from edkm_export.stop_texts import StopTexts


def shown(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    filtered = StopTexts(stops)
    text = ""
    for piece in pieces:
        text += filtered.push(piece)
    return text + filtered.finish(), filtered.found


@pytest.mark.parametrize(
    ("text", "stops", "expected", "found"),
    [
        ("one two three", ["two"], "one ", "two"),
        ("one two three", ["four"], "one two three", None),
        ("aab", ["ab"], "a", "ab"),
        ("aaab aab", ["aab"], "a", "aab"),
        ("ends with the stop", ["stop"], "ends with the ", "stop"),
        ("ends with a part: sto", ["stop"], "ends with a part: sto", None),
        ("stop", ["stop"], "", "stop"),
        ("abcd", ["bcd", "c"], "ab", "c"),  # the first that is complete
        ("abcd", ["cd", "bcd"], "a", "bcd"),  # of two that are complete at once, the longer
        ("ein Fluß, ein", ["ß"], "ein Flu", "ß"),
        ("line\n\nnext", ["\n\n"], "line", "\n\n"),
        ("anything", [], "anything", None),
        ("", ["x"], "", None),
    ],
)
def test_however_the_text_is_cut(text, stops, expected, found):
    generator = random.Random(0)
    assert shown([text], stops) == (expected, found)
    assert shown(list(text), stops) == (expected, found)
    for _ in range(20):
        cuts = sorted(generator.sample(range(len(text) + 1), min(3, len(text))))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert shown(pieces, stops) == (expected, found)


def test_text_is_out_as_soon_as_it_is_certain():
    filtered = StopTexts(["END"])
    assert [filtered.push(piece) for piece in ("one ", "E", "N", "x", "E")] == ["one ", "", "", "ENx", ""]
    assert filtered.finish() == "E"


def test_nothing_comes_after_a_stop_text():
    filtered = StopTexts(["END"])
    assert filtered.push("one END two") == "one " and filtered.push("three") == "" and filtered.finish() == ""


def test_empty_stop_text():
    with pytest.raises(InputError, match="--stop: is empty"):
        StopTexts(["x", ""])
