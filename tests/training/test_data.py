"""Data files: what is read, and how bad lines are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from edkm_export.errors import InputError
from edkm_export.training.data import read_documents, tokenize
from edkm_export.training.tokens import Tokens
from edkm_export.training.windows import PackedWindows
from tests.helpers.odd_models import build_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write(path: Path, *records: Any) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def chat_tokenizer() -> Any:
    tokenizer = build_tokenizer(320)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def spoken(tokenizer: Any, tokens: Tokens) -> str:
    """The text that counts."""
    assert tokens.counts is not None
    return tokenizer.decode(tokens.ids[tokens.counts].tolist())


def test_all_forms_are_read(tmp_path: Path) -> None:
    text = tmp_path / "plain.txt"
    text.write_text("One.\nTwo.\n", encoding="utf-8")
    lines = write(
        tmp_path / "mixed.jsonl",
        {"text": "Three."},
        "",
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {
            "instruction": "Name two.",
            "instances": [{"input": "", "output": "a"}, {"input": "x", "output": "b"}],
        },
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    )
    documents = list(read_documents([text, lines]))
    assert [document.where for document in documents] == [
        str(text),
        *(f"{lines}:{n}" for n in (1, 3, 4, 4, 5)),
    ]
    tokenizer = chat_tokenizer()
    tokens = tokenize(documents, tokenizer)
    decoded = tokenizer.decode(tokens.ids.tolist())
    assert decoded.startswith("One.\nTwo.\n<|endoftext|>Three.<|endoftext|>Below is an instruction")
    assert "### Input:\n1 and 2\n\n### Response:\n3<|endoftext|>" in decoded
    assert decoded.endswith("<user>Hi;<assistant>Ho;")
    assert tokens.counts is None


def test_only_answers_count_when_asked(tmp_path: Path) -> None:
    lines = write(
        tmp_path / "a.jsonl",
        {"instruction": "Add.", "output": "three"},
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"},
                      {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "Hm"},
                      {"role": "assistant", "content": "Ha"}]},
    )  # fmt: skip
    tokenizer = chat_tokenizer()
    tokens = tokenize(read_documents([lines]), tokenizer, answers_only=True)
    assert spoken(tokenizer, tokens) == "three<|endoftext|>Ho;Ha;"
    as_chat = tokenize(read_documents([lines]), tokenizer, answers_only=True, chat=True)
    assert spoken(tokenizer, as_chat) == "three;Ho;Ha;"


def test_a_template_that_rewrites_turns_is_learned_as_a_whole(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(320)
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    lines = write(
        tmp_path / "a.jsonl",
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    )
    assert spoken(tokenizer, tokenize(read_documents([lines]), tokenizer, answers_only=True)) == "2HiHo"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "is a JSON list, expected an object"),
        ({"prompt": "x"}, "has the fields prompt; expected 'text'"),
        ({"text": 3}, "'text' is 3, expected a text"),
        ({"text": "  "}, "'text' is empty"),
        ({"instruction": "x"}, "'output' is null"),
        ({"instruction": "x", "instances": []}, "'instances' must be a list that is not empty"),
        ({"messages": []}, "'messages' must be a list that is not empty"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 'role is "robot"'),
        ({"messages": [{"role": "user", "content": None}]}, "content of a message of the user is not a text"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", {"text": "good"}, line, {"text": "good"})
    with pytest.raises(InputError) as caught:
        list(read_documents([path]))
    assert str(caught.value).startswith(f"{path}:2: ") and message in str(caught.value)


def test_a_template_that_refuses_is_named(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(320)
    lines = write(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "Hi"}]})
    with pytest.raises(InputError, match=r"a\.jsonl:1: .* no chat template"):
        tokenize(read_documents([lines]), tokenizer)
    tokenizer.chat_template = "{{ raise_exception('only pairs') }}"
    with pytest.raises(InputError, match=r"a\.jsonl:1: .*refuses it \(only pairs\)"):
        tokenize(read_documents([lines]), tokenizer)


def test_long_texts_are_cut_at_lines_without_loss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("edkm_export.training.data._TEXT_CHARACTERS", 50)
    text = "\n".join(f"line {n} of a longer text" for n in range(40)) + "x" * 200
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    tokenizer = build_tokenizer(320)
    tokens = tokenize(read_documents([tmp_path / "a.txt"]), tokenizer)
    assert tokenizer.decode(tokens.ids.tolist()) == text + "<|endoftext|>"


def test_each_pass_shows_every_token_once_at_other_borders() -> None:
    data = PackedWindows(Tokens(torch.arange(103)), context=10, samples=1000, seed=3)
    passes = [[data[turn * 10 + place]["input_ids"] for place in range(10)] for turn in range(3)]
    borders = []
    for windows in passes:
        seen = torch.cat(windows)
        assert len(seen.unique()) == 100  # the ring's last three are left out
        assert all((window.diff() % 103 == 1).all() for window in windows)
        borders.append(sorted(int(window[0]) for window in windows))
    assert borders[0] != borders[1] != borders[2]
    again = PackedWindows(Tokens(torch.arange(103)), context=10, samples=1000, seed=3)
    assert torch.equal(again[25]["input_ids"], passes[2][5])  # a function of seed and place alone


def test_too_little_data_is_refused() -> None:
    with pytest.raises(InputError, match="9 tokens, but a window takes 10"):
        PackedWindows(Tokens(torch.arange(9)), context=10, samples=1, seed=0)


def test_token_files(tmp_path: Path) -> None:
    Tokens(torch.tensor([1, 2, 3])).save(tmp_path / "a.tokens")
    assert Tokens.load(tmp_path / "a.tokens").ids.tolist() == [1, 2, 3]
    (tmp_path / "b.tokens").write_bytes(b"hello")
    for name, message in (("b", "is not a file of tokens"), ("c", "no such file")):
        with pytest.raises(InputError, match=message):
            Tokens.load(tmp_path / f"{name}.tokens")
