"""Files of tasks: what is read, and what is refused with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edkm_export.errors import InputError
from edkm_export.verify.multiple_choice import Item
from edkm_export.verify.task_grading import is_right, normalized
from edkm_export.verify.tasks import BUILTIN, GenerationItem, read_tasks

SOUND = {"kind": "generation", "prompt": "1 + 1 =", "answers": ["2"]}


def written(path: Path, *lines: Any) -> Path:
    text = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def test_items_are_grouped_by_task(tmp_path: Path) -> None:
    choice = {"kind": "choice", "prompt": "Hot is not", "choices": ["cold", "warm"], "gold": 0}
    first = written(tmp_path / "mine.jsonl", SOUND, "", {**SOUND, "task": "sums"}, choice)
    other = written(
        tmp_path / "theirs.jsonl",
        {"query": "Question: hot?", "choices": ["yes", "no"], "gold": 1},
        {"context_options": ["He", "She"], "continuation": "ran.", "gold": 0},
        {**SOUND, "task": "sums"},
    )
    found = {task.name: task.items for task in read_tasks([first, other])}
    assert {name: len(items) for name, items in found.items()} == {
        "mine": 2, "sums": 1, "theirs": 2, "sums (theirs)": 1,
    }  # fmt: skip
    assert found["mine"][1] == Item(("Hot is not", "Hot is not"), ("cold", "warm"), 0)
    assert found["theirs"][0].contexts[0] == "Question: hot?\nAnswer:" and found["theirs"][1].gold == 0
    assert found["mine"][0].turns[0].content == "1 + 1 ="


def test_the_set_that_ships() -> None:
    """Every kind of answer, small, none twice, and each answer that is told right is found right."""
    tasks = read_tasks([BUILTIN])
    items = [item for task in tasks for item in task.items]
    generated = [item for item in items if isinstance(item, GenerationItem)]
    assert {item.match for item in generated} == {"exact", "number", "json", "tool-call"}
    assert any(isinstance(item, Item) for item in items) and 20 <= len(items) <= 30
    assert len({repr(item) for item in items}) == len(items)
    assert sum(item.max_new_tokens for item in generated) < 500
    for item in generated:
        answer = item.answers[0]
        assert is_right(item, answer if isinstance(answer, str) else json.dumps(answer))
        examples = [turn.content for turn in item.turns if turn.role == "assistant"]
        assert examples and not any(is_right(item, example) for example in examples)


HOSTILE: list[tuple[Any, str]] = [
    ("{", "is not JSON"),
    ("[" * 100_000, "has 100,000 characters"),
    ("[" * 15_000, "is not JSON"),
    ('{"kind": "generation", "prompt": "x", "answers": [NaN]}', "NaN is no JSON value"),
    ('{"kind": "generation", "prompt": "x", "answers": ["\\ud800"]}', "half of a surrogate pair"),
    ("17", "is int, expected an object"),
    ({"prompt": "x"}, "kind is None, expected generation or choice"),
    ({"kind": ["choice"]}, "kind is ['choice']"),
    ({**SOUND, "answers": []}, "answers: Tuple should have at least 1 item"),
    ({**SOUND, "answers": [2]}, "with match 'exact' an answer is text, found 2"),
    ({**SOUND, "match": "regex"}, "match: Input should be 'exact', 'number', 'json' or 'tool-call'"),
    ({**SOUND, "match": "tool-call", "answers": [{"name": "x"}]}, "a tool call is"),
    ({**SOUND, "stop": [""]}, "stop: an empty text ends every answer"),
    ({**SOUND, "max_new_tokens": 10**9}, "max_new_tokens: Input should be less than or equal to 1024"),
    ({**SOUND, "answer": "2"}, "answer: Extra inputs are not permitted"),
    ({**SOUND, "task": "\u001b[31mred"}, "task: String should match pattern"),
    ({**SOUND, "messages": [{"role": "user", "content": "x"}]}, "give prompt or messages"),
    ({"kind": "generation", "answers": ["2"]}, "give prompt or messages"),
    (
        {"kind": "generation", "answers": ["2"], "messages": [{"role": "system", "content": "x"}]},
        "messages.0.role: Input should be 'user' or 'assistant'",
    ),
    (
        {"kind": "generation", "answers": ["2"], "messages": [{"role": "assistant", "content": "x"}]},
        "the user begins",
    ),
    ({"kind": "choice", "prompt": "x", "choices": ["a"], "gold": 0}, "choices: Tuple should have at least 2"),
    ({"kind": "choice", "prompt": "x", "choices": ["a", "b"], "gold": 2}, "gold: expected 0 to 1"),
    ({"kind": "choice", "prompt": "x", "choices": ["a", ""], "gold": 0}, "choices: one is empty"),
    ({"gold": 0, "choices": "ab"}, "expected `query` and `choices`"),
]


@pytest.mark.parametrize(("line", "message"), HOSTILE)
def test_a_line_that_is_no_item_is_named(line: Any, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "bad.jsonl", SOUND, line)
    with pytest.raises(InputError) as refused:
        read_tasks([path])
    assert str(refused.value).startswith(f"{path}: line 2") and message in str(refused.value)
    assert len(str(refused.value)) < 600


def test_files_that_hold_nothing_or_too_much(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"empty\.jsonl: is empty"):
        read_tasks([written(tmp_path / "empty.jsonl", "", " ")])
    with pytest.raises(InputError, match=r"gone\.jsonl"):
        read_tasks([tmp_path / "gone.jsonl"])
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"bytes\.jsonl"):
        read_tasks([tmp_path / "bytes.jsonl"])
    with pytest.raises(InputError, match="holds 5,001 items, at most 5,000 are taken"):
        read_tasks([written(tmp_path / "many.jsonl", *[SOUND] * 5001)])


def test_the_command_ends_with_status_2(edkm: Any, work: Path, tiny_export: Any) -> None:
    path = written(work / "bad.jsonl", SOUND, {**SOUND, "match": "regex"})
    result = edkm("verify", tiny_export.model, tiny_export.bundle, "--tasks", path, "--report", "report")
    assert result.status == 2 and result.message.startswith(f"{path}: line 2: match: Input should be")
    result = edkm("verify", tiny_export.model, tiny_export.bundle, "--max-task-loss", 0.1)
    assert result.status == 2 and "beside the tasks (--tasks)" in result.message
    assert not (work / "report").exists()


CALL = {"name": "f", "arguments": {"x": 1}}

# match, answer, right ones, wrong ones
GRADED: list[tuple[str, Any, list[str], list[str]]] = [
    (
        "exact", "blue sky", ["blue sky", " blue\n sky. ", '"blue sky"', "`blue sky`", "\uff42lue sky", "blue sky."],
        ["Blue sky", "The answer is blue sky", "blue sky!", "", "bluesky", '"blue sky'],
    ),
    ("number", "1200", ["1200", "1,200", "1200.0", "+1200", " 1200.\n"], ["12,00", "1200 apples", "= 1200", "1e3", ""]),
    ("number", "-3", ["-3", "'-3'"], ["3", "- 3", "\u22123 or so"]),
    (
        "json", {"a": 1, "b": [True, None]},
        ['{"b": [true, null], "a": 1.0}', '```json\n{"a": 1, "b": [true, null]}\n```', ' {"a":1,"b":[true,null]}\n'],
        ['{"a": 1, "b": [1, null]}', '{"a": true, "b": [true, null]}', 'Here: {"a": 1, "b": [true, null]}',
         '{"a": 1, "b": [true, null], "c": 0}', '{"a": 1', "[" * 100_000, '{"a": NaN}', "{'a': 1, 'b': [True, None]}"],
    ),
    ("json", "text", ['"text"'], ["text"]),
    (
        "tool-call", CALL,
        [json.dumps(CALL), f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>", json.dumps([CALL]),
         '{"name": "f", "parameters": {"x": 1}}',
         '{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}'],
        [json.dumps({**CALL, "name": "g"}), '{"name": "f", "arguments": {"x": "1"}}', '{"name": "f"}', "f(x=1)",
         json.dumps([CALL, CALL]), "[]", "1", f"I call {json.dumps(CALL)}"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("match", "answer", "right", "wrong"), GRADED)
def test_grading(match: Any, answer: Any, right: list[str], wrong: list[str]) -> None:
    item = GenerationItem(kind="generation", prompt="x", match=match, answers=(answer,))
    assert [text for text in right if not is_right(item, text)] == []
    assert [text for text in wrong if is_right(item, text)] == []


def test_normalization_takes_one_pair_of_quotes_off() -> None:
    assert (
        normalized("\u201ca  b\u201d") == "a b"
        and normalized('""') == ""
        and normalized('"a" and "b') == '"a" and "b'
    )
