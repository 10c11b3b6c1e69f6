"""Scores against sums that are written out one token at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from edkm_export.errors import InputError
from edkm_export.reference.hard_model import load_hard_model, load_hard_tokenizer
from edkm_export.verify.multiple_choice import (
    Item,
    accuracy,
    batched,
    encode_pair,
    grade,
    load_items,
    log_likelihoods,
    one_by_one,
)
from edkm_export.verify.torch_runs import transformers_model

ITEMS = [
    Item(("A bug is",) * 3, ("an error in a program.", "a kind of fruit.", "the"), 0),
    Item(("To hack is",) * 2, ("to program with enthusiasm.", "zq xv"), 0),
    Item(("The user said", "The kernel said"), ("that it was broken.",) * 2, 1),
]


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_hard_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return load_hard_tokenizer(tiny_checkpoint)


def by_hand(model, tokenizer, before: str, choice: str) -> tuple[float, bool]:
    """Log likelihood of a choice, one forward pass a token."""
    tokens = tokenizer(f"{before} {choice}")["input_ids"]
    start = len(tokenizer(before)["input_ids"])
    total, greedy = 0.0, True
    for place in range(start, len(tokens)):
        logits = model(input_ids=torch.tensor([tokens[:place]])).logits[0, -1].double()
        total += float(logits[tokens[place]] - torch.logsumexp(logits, 0))
        greedy &= int(logits.argmax()) == tokens[place]
    return total, greedy


def test_likelihoods_are_those_of_one_token_at_a_time(model, tokenizer):
    pairs = [
        (before, choice)
        for item in ITEMS
        for before, choice in zip(item.contexts, item.continuations, strict=True)
    ]
    encoded = [encode_pair(tokenizer, before, f" {choice}") for before, choice in pairs]
    expected = [by_hand(model, tokenizer, *pair) for pair in pairs]
    for run in (model, batched(model), one_by_one(transformers_model(model))):
        found = log_likelihoods(run, encoded)
        # float32 logits of size 10 and up to 10 tokens: 1e-4 is far above rounding, far below any difference of meaning
        assert [score.nats for score in found] == pytest.approx([nats for nats, _ in expected], abs=1e-4)
        assert [score.greedy for score in found] == [greedy for _, greedy in expected]


def test_accuracy_is_the_share_of_right_answers(model, tokenizer):
    plain = normalized = 0
    for item in ITEMS:
        nats = [
            by_hand(model, tokenizer, before, choice)[0]
            for before, choice in zip(item.contexts, item.continuations, strict=True)
        ]
        per_character = [value / len(choice) for value, choice in zip(nats, item.continuations, strict=True)]
        plain += nats.index(max(nats)) == item.gold
        normalized += per_character.index(max(per_character)) == item.gold
    found = grade(model, tokenizer, ITEMS)
    assert (found.plain, found.normalized, found.items) == (plain / 3, normalized / 3, 3)
    share, error = accuracy(model, tokenizer, ITEMS, normalized=False)
    assert share == plain / 3 and error == pytest.approx(math.sqrt(share * (1 - share) / 2))


def test_normalization_decides_between_short_and_long(tokenizer):
    """Every token costs the same: the short choice wins as a whole, the long one per character."""
    items = [Item(("A",) * 2, ("x y", "something considerably longer"), 1)]

    def flat(texts):
        return [torch.zeros(len(text), len(tokenizer)) for text in texts]

    found = grade(flat, tokenizer, items)
    assert (found.plain, found.normalized) == (0.0, 1.0)


def test_long_contexts_lose_their_beginning(model, tokenizer):
    before, after = encode_pair(tokenizer, "word " * 40, " end")
    (found,) = log_likelihoods(model, [(before, after)], context=16)
    kept = [*before, *after][-17:]
    logits = model(input_ids=torch.tensor([kept[:-1]])).logits[0].double().log_softmax(-1)
    expected = sum(float(logits[place - 1, kept[place]]) for place in range(17 - len(after), 17))
    assert found.nats == pytest.approx(expected, abs=1e-4)
    with pytest.raises(InputError, match="at most 2"):
        log_likelihoods(model, [(before, [1, 2, 3])], context=2)


def test_spaces_behind_a_context_belong_to_the_continuation(tokenizer):
    assert encode_pair(tokenizer, "A bug is ", "small") == encode_pair(tokenizer, "A bug is", " small")


def test_empty_context_is_the_start_of_a_text(tokenizer):
    before, after = encode_pair(tokenizer, "", " word")
    assert len(before) == 1 and after == tokenizer(" word", add_special_tokens=False)["input_ids"]


# Files


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n\n")
    return path


def test_both_forms_are_read(tmp_path):
    path = write(
        tmp_path / "questions.jsonl",
        {"query": "Question: why?", "choices": ["because", "not"], "gold": 1},
        {"context_options": ["She", "He"], "continuation": "left.", "gold": 0},
    )
    assert load_items(path) == [
        Item(("Question: why?\nAnswer:",) * 2, ("because", "not"), 1),
        Item(("She", "He"), ("left.", "left."), 0),
    ]
    assert len(load_items(path, limit=1)) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: is not JSON"),
        ("[]", "line 1: is list, expected an object"),
        ({"question": "?"}, "line 1: has question; expected `query`"),
        ({"query": "?", "choices": ["one"], "gold": 0}, "expected `query` and `choices`"),
        ({"query": "?", "choices": ["a", "b"], "gold": 2}, "line 1: gold is 2, expected 0 to 1"),
        ({"query": "?", "choices": ["a", "b"], "gold": True}, "gold is True"),
        ("", "is empty"),
    ],
)
def test_lines_that_are_no_questions(tmp_path, line, message):
    with pytest.raises(InputError, match=message):
        load_items(write(tmp_path / "questions.jsonl", line))


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="no such text file"):
        load_items(tmp_path / "gone.jsonl")
