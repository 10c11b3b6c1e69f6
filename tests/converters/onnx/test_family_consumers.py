"""Families in onnxruntime-genai, optimum and transformers.js: those that each knows, with hard PyTorch's tokens.

For the variables that name their environments see `test_export_consumers`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from edkm_export.reference.hard_model import load_hard_model
from tests.converters.onnx.test_export_consumers import (
    GENAI,
    OPTIMUM,
    TRANSFORMERS_JS,
    greedy,
    place,
    run,
)
from tests.helpers.odd_families import CASES, EXPORTED
from tests.helpers.onnx_models import export, family_checkpoint

END = 2  # of all families here

# onnxruntime-genai has names for keys and values of one size alone.
GENAI_KNOWS = [case for case in EXPORTED if case not in ("gemma4", "lfm2", "qwen3_5")]
# optimum-onnx 0.1 makes the first, empty cache itself. Of other families it takes each head for a key/value head of its
# own; of most it does not read `head_dim`.
OPTIMUM_KNOWS = ["gemma3", "gpt2", "granite", "mistral", "qwen2", "qwen3", "smollm3", "stablelm"]
OPTIMUM_READS_HEAD_DIM = ("gemma3",)
# transformers.js 4.3 has no such model types; of Qwen3.5 it runs vision-language folders alone.
TRANSFORMERS_JS_KNOWS = [case for case in EXPORTED if case not in ("exaone4", "gemma3n", "gemma4", "qwen3_5")]


def until_end(tokens: list[int]) -> list[int]:
    """Each of these programs stops there, as it should."""
    return tokens[: tokens.index(END)] if END in tokens else tokens


def exported(case: str, folder: Path) -> tuple[Path, list[int]]:
    """A folder, and the tokens to expect: hard PyTorch's."""
    made = family_checkpoint(case)
    model = load_hard_model(made)
    with torch.no_grad():
        expected = greedy(lambda tokens: int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return export(made, folder / "model"), until_end(expected)


def test_genai_config_is_there_for_what_can_be_run(tmp_path):
    for case in ("gemma4", "lfm2", "olmo2"):
        folder = export(family_checkpoint(case), tmp_path / case)
        assert (folder / "genai_config.json").exists() == (case in GENAI_KNOWS)


def test_layer_types_are_those_of_published_configurations(tmp_path):
    folder = export(family_checkpoint("granitemoehybrid"), tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["layer_types"] == ["attention"] * 2


@pytest.mark.genai
@pytest.mark.parametrize("case", GENAI_KNOWS)
def test_onnxruntime_genai(case, tmp_path):
    folder, expected = exported(case, tmp_path)
    assert until_end(run([place("EDKM_GENAI_PYTHON"), "-c", GENAI], folder)) == expected


@pytest.mark.optimum
@pytest.mark.parametrize("case", OPTIMUM_KNOWS)
def test_optimum(case, tmp_path, monkeypatch):
    kind, arguments = CASES[case]
    if "head_dim" in arguments and case not in OPTIMUM_READS_HEAD_DIM:
        head_dim = arguments["hidden_size"] // arguments["num_attention_heads"]
        monkeypatch.setitem(CASES, case, (kind, {**arguments, "head_dim": head_dim}))
    folder, expected = exported(case, tmp_path)
    assert until_end(run([place("EDKM_OPTIMUM_PYTHON"), "-c", OPTIMUM], folder)) == expected


@pytest.mark.transformersjs
@pytest.mark.parametrize("case", TRANSFORMERS_JS_KNOWS)
def test_transformers_js(case, tmp_path):
    folder, expected = exported(case, tmp_path)
    (tmp_path / "node_modules").symlink_to((Path(place("EDKM_TRANSFORMERSJS")) / "node_modules").resolve())
    script = tmp_path / "run.mjs"
    script.write_text(TRANSFORMERS_JS)
    assert until_end(run(["node", str(script)], folder)) == expected
