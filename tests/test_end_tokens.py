from __future__ import annotations

import json

import pytest

from edkm_export.end_tokens import as_setting, end_tokens, stored_end_tokens, with_end_tokens


def files(**contents: object) -> dict[str, bytes]:
    return {f"{name}.json": json.dumps(content).encode() for name, content in contents.items()}


def test_union_in_the_order_of_the_files():
    assert end_tokens({"eos_token_id": [5, 3]}, {"eos_token_id": 3}, {"eos_token_id": 9}) == (5, 3, 9)


@pytest.mark.parametrize("value", [None, True, "2", -1, 2.0, [None, "2"], {}])
def test_what_is_no_token_is_left_out(value):
    assert end_tokens({"eos_token_id": value}, {}) == ()


@pytest.mark.parametrize(("ends", "value"), [((), None), ((4,), 4), ((4, 2), [4, 2])])
def test_setting(ends, value):
    assert as_setting(ends) == value


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"added_tokens": [{"id": 7, "content": "<end>"}]},
        {"model": {"vocab": {"a": 0, "<end>": 7}}},
        {"model": {"vocab": [[str(number), 0.0] for number in range(7)] + [["<end>", 0.0]]}},
    ],
    ids=["added", "vocabulary", "unigram"],
)
@pytest.mark.parametrize("named", ["<end>", {"content": "<end>", "special": True}], ids=["text", "object"])
def test_end_of_the_tokenizer(tokenizer, named):
    stored = files(tokenizer=tokenizer, tokenizer_config={"eos_token": named})
    assert stored_end_tokens({}, stored) == (7,)
    assert stored_end_tokens({"eos_token_id": 0}, stored) == (0, 7)


def test_end_among_the_added_tokens_of_the_settings():
    settings = {"eos_token": "<end>", "added_tokens_decoder": {"12": {"content": "<end>"}}}
    assert stored_end_tokens({}, files(tokenizer_config=settings)) == (12,)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff"])
def test_damaged_files_name_none(content):
    stored = dict.fromkeys(("generation_config.json", "tokenizer_config.json", "tokenizer.json"), content)
    assert stored_end_tokens({"eos_token_id": 4}, stored) == (4,)


def test_none_is_made_up():
    assert stored_end_tokens({"vocab_size": 5}, {}) == ()
    assert with_end_tokens({"vocab_size": 5}, {}) == {"vocab_size": 5}
    stored = files(generation_config={"eos_token_id": [3, 1]})
    assert with_end_tokens({"eos_token_id": 1}, stored) == {"eos_token_id": [3, 1]}
