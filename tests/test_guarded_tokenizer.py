"""Tokenizers and chat templates that are made to take long: ended, with a message, whatever they do."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
import transformers

from edkm_export import guarded_tokenizer
from edkm_export.errors import InputError
from edkm_export.guarded_tokenizer import TokenizerError, open_tokenizer
from edkm_export.prompt import encode_turns, read_tokenizer
from tests.helpers.odd_models import build_tokenizer

TURNS = [{"role": "user", "content": "Hello"}]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
ENDLESS = "".join(f"{{% for {name} in range(90000) %}}" for name in "abc") + "{% endfor %}" * 3
HUGE = "{% for a in range(90000) %}{{ 'x' * 90000 }}{% endfor %}"


@pytest.fixture
def folder(tmp_path) -> Path:
    build_tokenizer(320).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(guarded_tokenizer, "_SECONDS", 1.0)


def changed(folder: Path, **parts: Any) -> Path:
    path = folder / "tokenizer.json"
    contents = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**contents, **parts}), encoding="utf-8")
    return folder


def with_template(folder: Path, template: str) -> Path:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def test_is_the_tokenizer_of_transformers(folder) -> None:
    with_template(folder, TEMPLATE)
    plain = transformers.AutoTokenizer.from_pretrained(folder)
    ours = open_tokenizer(folder, "it")
    text = "The quick brown fox, ä 漢字 🙂 \ud83d\n"
    for options in ({}, {"add_special_tokens": False}, {"return_attention_mask": False}):
        sound = text.replace("\ud83d", "")
        assert dict(ours(sound, **options)) == dict(plain(sound, **options))
    ids = ours("some words")["input_ids"]
    assert ours.decode(ids) == plain.decode(ids) and ours.decode(ids[0]) == plain.decode(ids[0])
    for options in ({"tokenize": False}, {"tokenize": False, "add_generation_prompt": True}):
        assert ours.apply_chat_template(TURNS, **options) == plain.apply_chat_template(TURNS, **options)
    assert ours.eos_token_id == plain.eos_token_id and len(ours) == len(plain)
    assert ours.chat_template == TEMPLATE


# A letter becomes ten million: each rule makes ten of one.
BOMB = {
    "type": "Sequence",
    "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}] * 8,
}
SLOW = {
    "type": "Sequence",
    "normalizers": [{"type": "Replace", "pattern": {"Regex": "(a+a+)+b"}, "content": "b"}] * 2,
}


@pytest.mark.parametrize("normalizer", [BOMB, SLOW], ids=["grows", "backtracks"])
def test_rules_that_never_end(folder, impatient, normalizer) -> None:
    changed(folder, normalizer=normalizer)
    begun = time.monotonic()
    with pytest.raises(InputError) as caught:
        open_tokenizer(folder, "it")("a" * 4000)
    assert str(caught.value).startswith("it: ") and time.monotonic() - begun < 15


def test_a_hostile_pattern_is_an_error_or_none(folder) -> None:
    """Some make the library panic, which is no Exception."""
    for pattern in ("(?<=a+)b", "(" * 5000, "[", "(?:a{1000}){1000}", "\\p{Foo}"):
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        with contextlib.suppress(InputError):
            assert read_tokenizer(changed(folder, pre_tokenizer=split)) is not None


@pytest.mark.parametrize("template", [ENDLESS, HUGE], ids=["endless", "huge"])
def test_a_template_that_never_ends(folder, impatient, template) -> None:
    tokenizer = read_tokenizer(with_template(folder, template))
    with pytest.raises(
        TokenizerError, match=r"took more than 1 s and was stopped|too much memory|chat template fails"
    ):
        encode_turns(tokenizer, TURNS, "it")


def test_what_was_ended_says_so(folder, impatient) -> None:
    tokenizer = read_tokenizer(with_template(folder, ENDLESS))
    with pytest.raises(TokenizerError, match="was stopped"):
        encode_turns(tokenizer, TURNS, "it")
    with pytest.raises(TokenizerError, match="was ended before"):
        tokenizer("text")


@pytest.mark.parametrize(
    "template", ["{{ x.y.z }}", "{% for %}", "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}"]
)
def test_a_template_that_fails(folder, template) -> None:
    with pytest.raises(InputError, match="its chat template fails"):
        encode_turns(read_tokenizer(with_template(folder, template)), TURNS, "it")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json"]
)
def test_a_pipe_among_its_files(folder, name) -> None:
    import os

    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match="is a pipe or a device"):
        open_tokenizer(folder, "it")


def test_what_the_parent_left_is_not_collected_in_the_child(folder, tmp_path) -> None:
    import gc
    import os

    owner, trace = os.getpid(), tmp_path / "collected"

    class Left:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            if os.getpid() != owner:
                trace.touch()

    def load() -> Any:
        gc.collect()
        return transformers.AutoTokenizer.from_pretrained(folder)

    gc.disable()
    try:
        Left()
        guarded_tokenizer.guarded(load, "it", 1000)
    finally:
        gc.enable()
    assert not trace.exists()


def test_its_process_ends_with_it(folder) -> None:
    import gc
    import os

    tokenizer = open_tokenizer(folder, "it")
    pid = tokenizer._child._pid
    os.kill(pid, 0)
    del tokenizer
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
