"""Tasks in the ladder: a model that reads as well as before and no longer keeps a format; ties; templates."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import edkm_export
from edkm_export import checkpoint
from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import InputError
from edkm_export.recipe import Recipe, Rule
from edkm_export.reference.hard_model import load_hard_model, load_hard_tokenizer
from edkm_export.verify.report import Report, Rung, Verdict
from edkm_export.verify.task_runs import Question, answers_of, artifact_answers, questions_of
from edkm_export.verify.tasks import BUILTIN, read_tasks
from edkm_export.verify.torch_runs import transformers_model
from edkm_export.verify.write import markdown
from tests.helpers.exports import palettized_folder
from tests.helpers.odd_models import build, build_tokenizer, save

NAMES = ("Tom", "Eva", "Max", "Ann")
PROSE = "The sun rose over the hill and the birds began to sing while the river ran on to the sea. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama that knows some prose, and to answer names with JSON, by heart."""
    model, tokenizer = build("untied").train(), build_tokenizer(320)
    lines = [f'name {name}\n{{"name": "{name}"}}\n' for name in NAMES]
    texts = [torch.tensor(tokenizer(text)["input_ids"]) for text in (*lines, PROSE)]
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-100)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = model(input_ids=padded, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1
    return save(model.eval(), tmp_path_factory.mktemp("tasks") / "model")


@pytest.fixture(scope="module")
def sound(folder: Path) -> Checkpoint:
    """The same at 8 bits, each row of the head with a LUT of its own."""
    rules = (Rule(match="lm_head", bits=8, group_size=1), Rule(bits=8, group_size=16))
    return palettized_folder(folder, Recipe(rules=rules), folder.parent / "model.pt")


@pytest.fixture(scope="module")
def tasks(folder: Path) -> Path:
    """JSON from names, and words that go on."""
    lines = [
        {
            "kind": "generation",
            "task": "JSON",
            "prompt": f"name {name}",
            "answers": [{"name": name}],
            "match": "json",
        }
        for name in NAMES
    ]
    words = PROSE.split()
    for place in (4, 7, 10):
        before, after = " ".join(words[:place]), words[place]
        lines.append(
            {"kind": "choice", "task": "words", "prompt": before, "choices": [after, "zzz"], "gold": 0}
        )
    path = folder.parent / "tasks.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def without_braces(made: Checkpoint, path: Path) -> Checkpoint:
    """The head never gives a brace: its row is turned round, all others are as they were."""
    head = made.palettized["lm_head.weight"]
    token = build_tokenizer(320)("{")["input_ids"][0]
    lut = head.lut.clone()
    lut[token] = -lut[token]
    changed = {**made.palettized, "lm_head.weight": dataclasses.replace(head, lut=lut)}
    checkpoint.save(dataclasses.replace(made, palettized=changed), path)
    return checkpoint.load(path)


def rung(report: Report, name: str) -> Rung:
    return next(rung for rung in report.rungs if rung.id == name)


def test_a_model_that_loses_a_format_and_no_perplexity_is_seen(
    folder: Path, sound: Checkpoint, tasks: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    broken = without_braces(sound, tmp_path / "broken.pt")
    reports = {}
    for name, made in {"sound": sound, "broken": broken}.items():
        exported = edkm_export.export(made, tmp_path / name, "onnx", runtime="exact")
        reports[name] = exported.verify(
            text=[PROSE * 3], tokens=128, original=folder, tasks=tasks, max_task_loss=0.25
        )
    for name, found in reports.items():
        assert found.faithful_export is Verdict.PASS  # what was palettized is what runs
        assert rung(found, "palettization").verdict is Verdict.WITHIN and found.perplexity_ratio < 1.03
        assert rung(found, "tasks-artifact").verdict is Verdict.PASS
        results = {task.task: task for task in found.tasks}
        counts = 4 if name == "sound" else 0
        assert (results["JSON"].original, results["JSON"].palettized, results["JSON"].artifact) == (
            4,
            counts,
            counts,
        )
        assert (results["words"].original, results["words"].palettized, results["words"].items) == (3, 3, 3)
    assert reports["sound"].quality is Verdict.WITHIN and not reports["sound"].failed
    broken_report = reports["broken"]
    assert (
        broken_report.quality is rung(broken_report, "tasks").verdict is Verdict.BEYOND
        and broken_report.failed
    )
    assert "beyond the limit: JSON" in rung(broken_report, "tasks").detail
    text, page = markdown(broken_report), broken_report.html()
    assert (
        "| JSON | 4 | 4 | 0 | 0 |" in text and "the original answers 7 right, the palettized model 3" in text
    )
    assert "More than the limit is lost" in page and 'id="tasks"' in page
    assert Report.model_validate_json(broken_report.model_dump_json()) == broken_report
    shown = next(one for one in broken_report.tasks if one.task == "JSON").answers
    assert shown[0].original == '{"name": "Tom"}' and shown[0].right == ["original"]


def test_without_a_limit_it_is_reported(
    folder: Path, sound: Checkpoint, tasks: Path, tmp_path: Path, edkm: Any
) -> None:
    pytest.importorskip("onnxruntime")
    broken = without_braces(sound, tmp_path / "broken.pt")
    edkm_export.export(broken, tmp_path / "out", "onnx", runtime="exact")
    (tmp_path / "prose.txt").write_text(PROSE * 3, encoding="utf-8")
    result = edkm(
        "verify", tmp_path / "broken.pt", tmp_path / "out", "--tasks", tasks, "--tasks", BUILTIN, "--original", folder,
        "--text", tmp_path / "prose.txt", "--tokens", 128, "--report", tmp_path / "report",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert "original 4, palettized 0, artifact 0 of 4 right" in " ".join(result.out.replace("│", " ").split())
    found = Report.model_validate_json((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert rung(found, "tasks").verdict is Verdict.REPORTED and found.quality is Verdict.WITHIN
    # the context of 128 holds none of those with tools
    assert next(task for task in found.tasks if task.task == "tool calls").left_out == 4


def questions(made: Checkpoint, path: Path, context: int = 128) -> list[Question]:
    return questions_of(read_tasks([path]), made, load_hard_tokenizer(made), context)[0]


def test_an_artifact_that_answers_otherwise_is_a_fault_unless_at_a_tie(
    sound: Checkpoint, tasks: Path
) -> None:
    """Hard PyTorch as the artifact, with one logit moved: beyond the tie it is a fault, within it is none."""
    model, tokenizer, asked = load_hard_model(sound), load_hard_tokenizer(sound), questions(sound, tasks)
    hard = answers_of(model, asked, tokenizer)
    assert [answer.right for answer in hard] == [True] * 7
    execute = transformers_model(model)
    same, faults = artifact_answers(execute, None, 128, hard, asked, tokenizer, 0.01)
    assert same == hard and not faults

    start = len(asked[0].ids)
    gap = hard[0].choices[3].gap_nats
    second = hard[0].choices[3].best[1]

    def moved(tokens: torch.Tensor) -> torch.Tensor:
        """After the third token of an answer the second best is a little ahead of the best."""
        logits = execute(tokens).clone()
        if len(tokens) >= start + 3 and tokens[:start].equal(asked[0].ids):
            logits[start + 2, second] += gap + 1e-3
        return logits

    answers, faults = artifact_answers(moved, None, 128, hard, asked, tokenizer, 0.01)
    assert len(faults) == 1 and faults[0].startswith("item 1 of JSON: parts at token 4")
    assert not answers[0].right and answers[1:] == hard[1:]  # it went on in its own way
    answers, faults = artifact_answers(moved, None, 128, hard, asked, tokenizer, gap + 0.01)
    assert not faults and not answers[0].right

    def turned(tokens: torch.Tensor) -> torch.Tensor:
        return -execute(tokens)

    _, faults = artifact_answers(turned, None, 128, hard, asked, tokenizer, 0.01)
    assert len(faults) == 7 and "chooses 'choice 2', hard PyTorch 'choice 1'" in faults[-1]


def test_answers_of_int8_keys_and_values_are_counted_alone(
    sound: Checkpoint, tasks: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    exported = edkm_export.export(sound, tmp_path / "out", "onnx", runtime="exact", kv_cache="int8")
    found = exported.verify(text=[PROSE * 3], tokens=128, tasks=tasks)
    answers = rung(found, "tasks-artifact")
    assert answers.verdict is Verdict.REPORTED and answers.threshold == "none", answers.detail
    assert found.faithful_export is Verdict.PASS
    assert next(task for task in found.tasks if task.task == "JSON").artifact == 4


def test_weights_that_are_read_as_they_are_used_give_the_same_answers(sound: Checkpoint, tasks: Path) -> None:
    asked, tokenizer = questions(sound, tasks), load_hard_tokenizer(sound)
    whole = answers_of(load_hard_model(sound), asked, tokenizer)
    assert answers_of(load_hard_model(sound, room_bytes=1), asked, tokenizer) == whole


TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}</{{ turn.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("takes_tools", [True, False])
def test_answers_follow_the_chat_template(sound: Checkpoint, takes_tools: bool, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(320)
    tokenizer.chat_template = TEMPLATE if takes_tools else TEMPLATE.partition("{% endif %}")[2]
    tool = {"type": "function", "function": {"name": "f"}}
    item = {
        "kind": "generation", "tools": [tool], "answers": [{"name": "f", "arguments": {}}], "match": "tool-call",
        "messages": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "go"},
        ],
    }  # fmt: skip
    (tmp_path / "one.jsonl").write_text(json.dumps(item), encoding="utf-8")
    (question,), long = questions_of(read_tasks([tmp_path / "one.jsonl"]), sound, tokenizer, 400)
    text = tokenizer.decode(question.ids)
    assert text.endswith("one</user><assistant>two</assistant><user>go</user><assistant>")
    assert (
        text.startswith("<tools>[{" if takes_tools else "<user>You may call these functions:\n{")
        and '"f"' in text
    )
    assert not long and question.stops == () and question.length == len(question.ids) + 32
    assert questions_of(read_tasks([tmp_path / "one.jsonl"]), sound, tokenizer, 40) == ([], {"one": 1})


def test_a_template_that_fails_is_named(sound: Checkpoint, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(320)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    item = {"kind": "generation", "prompt": "x", "answers": ["y"]}
    (tmp_path / "one.jsonl").write_text(json.dumps(item), encoding="utf-8")
    with pytest.raises(InputError, match="item 1 of task 'one': its chat template fails: no such role"):
        questions_of(read_tasks([tmp_path / "one.jsonl"]), sound, tokenizer, 100)


def test_reports_of_version_5_are_read(folder: Path) -> None:
    from tests.verify.test_report import report

    fields = {
        name: value for name, value in json.loads(report().model_dump_json()).items() if name != "tasks"
    }
    assert Report.model_validate({**fields, "schema_version": 5}) == report()
