"""The adapter for EleutherAI's harness, against our own scores of the same questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edkm_export.errors import BackendMissingError, InputError
from edkm_export.reference.hard_model import load_hard_model, load_hard_tokenizer
from edkm_export.verify import harness
from edkm_export.verify.multiple_choice import grade, load_items, one_by_one
from edkm_export.verify.torch_runs import transformers_model

QUESTIONS = [
    {"query": "Question: What is a bug?", "choices": ["an error", "a fruit", "zq"], "gold": 0},
    {"query": "Question: What is a hacker?", "choices": ["xv", "a person who programs"], "gold": 1},
    {"query": "Question: What is a kernel?", "choices": ["the core", "of the"], "gold": 0},
    {"query": "Question: What is a daemon?", "choices": ["a program", "it", "and", "the machine"], "gold": 3},
]


@pytest.fixture
def task(tmp_path) -> Path:
    """A folder with one task, its data beside it."""
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tmp_path / "local_questions.yaml").write_text(
        f"""
task: local_questions
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
"""
    )
    return tmp_path


def test_missing_harness_is_explained(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(BackendMissingError, match=r"edkm-export\[eval\]"):
        harness.harness_model(lambda texts: [], None, context=64)


@pytest.mark.slow
def test_local_task_agrees_with_our_own_scores(task, tiny_checkpoint, monkeypatch, tmp_path):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    model, tokenizer = load_hard_model(tiny_checkpoint), load_hard_tokenizer(tiny_checkpoint)
    expected = grade(model, tokenizer, load_items(task / "questions.jsonl"))
    for run in (model, one_by_one(transformers_model(model))):
        wrapped = harness.harness_model(run, tokenizer, context=64)
        found = harness.run_tasks(wrapped, ["local_questions"], folder=task)["local_questions"]
        assert found["acc"] == expected.plain and found["acc_norm"] == expected.normalized
    with pytest.raises(InputError, match="no_such_task"):
        harness.run_tasks(wrapped, ["no_such_task"], folder=task)
