"""The first rung: the account of the source, and a GGUF file's own runtime."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import InputError
from edkm_export.reference.source import Source, account
from edkm_export.verify.report import SCHEMA_VERSION, Report, Verdict
from edkm_export.verify.source_rung import compare_with_runtime, source_rung, source_runtime_rung

WINDOWS = torch.arange(12).view(2, 6)
LOGITS = [torch.randn(6, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]


def checkpoint(**provenance: object) -> Checkpoint:
    return Checkpoint(config={}, palettized={}, dense={}, provenance=provenance)


class Runtime:
    """Answers as it is told."""

    def __init__(self, answer: Tensor | Exception, *, available: bool = True) -> None:
        self.answer, self.is_available, self.asked = answer, available, []
        self.plain: Path | None = None

    def available(self) -> bool:
        return self.is_available

    @contextlib.contextmanager
    def unpacked(self, path: Path, size_bytes: int):
        self.asked.append(("unpack", size_bytes))
        yield self.plain

    def log_probabilities(self, path: Path, tokens: list[int]) -> Tensor:
        self.asked.append((path, tokens))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def rung_of(runtime: Runtime | None, folder: Path):
    (folder / "model.gguf").write_bytes(b"GGUF")
    source = Source.parse(str(folder / "model.gguf"))
    found, rounded = compare_with_runtime(runtime, source, LOGITS, WINDOWS, values=100)
    return source_runtime_rung(found, rounded=rounded)


def test_source_that_is_understood(tiny_llama):
    rung = source_rung(checkpoint(), Source.parse(str(tiny_llama)), "")
    found = account(Source.parse(str(tiny_llama)))
    total = len(found.tensors) + len(found.settings) + len(found.without_effect)
    assert rung.verdict is Verdict.PASS and f"{total} of {total} accounted for" in rung.detail
    (digest,) = rung.measures["sha256"].values()
    assert f"sha256 model.safetensors {digest[:16]}..." in rung.detail


def test_source_with_parts_that_are_not_understood(tiny_llama, tmp_path):
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **{f"field_{number}": number for number in range(5)}}
    path.write_text(json.dumps(config))
    rung = source_rung(checkpoint(), Source.parse(str(folder)), "")
    assert rung.verdict is Verdict.FAIL
    assert "not understood: field_0: " in rung.detail and "field_2" in rung.detail
    assert "field_3" not in rung.detail and "and 2 more" in rung.detail
    assert len(rung.measures["not_understood"]) == 5


def test_source_that_is_not_here():
    rung = source_rung(checkpoint(), None, "it was not given")
    assert rung.verdict is Verdict.NOT_RUN and rung.detail == "no original to account for: it was not given"
    rung = source_rung(checkpoint(source={"tensors_used": 4, "settings_used": 3}), None, "it was not given")
    assert rung.detail.endswith("4 tensors and 3 settings were used and none was left over")


def test_runtime_that_agrees(tmp_path, monkeypatch):
    monkeypatch.setattr(Source, "is_quantized", False)
    runtime = Runtime(LOGITS[0].log_softmax(-1))
    rung = rung_of(runtime, tmp_path)
    assert rung.verdict is Verdict.PASS and rung.measures["kl_mean"] < 1e-9
    assert runtime.asked == [(tmp_path / "model.gguf", list(range(6)))]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (LOGITS[1].log_softmax(-1), "top-1 agreement 0.00%"),
        (LOGITS[0][:, :30].log_softmax(-1), "[6, 30] probabilities, the original [6, 32]"),
        (InputError("model.gguf: llama.cpp refuses the file (no)."), "refuses the file"),
    ],
    ids=["another model", "another vocabulary", "refused"],
)
def test_runtime_that_does_not(answer, words, tmp_path, monkeypatch):
    monkeypatch.setattr(Source, "is_quantized", False)
    rung = rung_of(Runtime(answer), tmp_path)
    assert rung.verdict is Verdict.FAIL and words in rung.detail


@pytest.mark.parametrize("can_unpack", [True, False])
def test_quantized_weights_are_unpacked_by_the_runtime(tmp_path, monkeypatch, can_unpack):
    """Where it cannot, it rounds activations: what is within that rounding is no fault, and a fault elsewhere."""
    monkeypatch.setattr(Source, "is_quantized", True)
    near = LOGITS[0] + 0.1 * torch.randn(LOGITS[0].shape, generator=torch.Generator().manual_seed(1))
    answer = near.log_softmax(-1)
    runtime = Runtime(answer)
    runtime.plain = tmp_path / "plain.gguf" if can_unpack else None
    rung = rung_of(runtime, tmp_path)
    assert 1e-3 < float(rung.measures["kl_median"]) < 2e-2
    assert rung.verdict is (Verdict.FAIL if can_unpack else Verdict.PASS)
    ran = tmp_path / ("plain.gguf" if can_unpack else "model.gguf")
    assert runtime.asked == [("unpack", 400), (ran, list(range(6)))]


@pytest.mark.parametrize(
    "runtime", [None, Runtime(LOGITS[0], available=False)], ids=["none", "not installed"]
)
def test_runtime_that_is_not_there(runtime, tmp_path):
    rung = rung_of(runtime, tmp_path)
    assert rung.verdict is Verdict.NOT_RUN and "npm install" in rung.detail


def test_older_reports_are_read():
    """Version 3 had no such rungs, and nothing else was different."""
    report = {
        "schema_version": 3, "artifact": "model", "kind": "ONNX folder", "verdict": "PASS", "not_run": [],
        "rungs": [], "perplexities": {}, "parameters": 1, "palettized_parameters": 1, "bits_per_weight": 4.0,
        "size_bytes": 1, "predicted_size_bytes": 1, "tensors": [], "provenance": {},
    }  # fmt: skip
    made = Report.model_validate(report)
    assert made.schema_version == SCHEMA_VERSION and made.faithful_export is Verdict.PASS
