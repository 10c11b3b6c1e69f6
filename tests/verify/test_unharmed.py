"""No false alarms: unharmed exports of several families and recipes pass, and localization finds nothing in them."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import palettized_folder
from odd_families import CASES, build_case
from odd_models import save

from edkm_export.checkpoint import Checkpoint
from edkm_export.models.hard import load_hard_model, load_hard_tokenizer
from edkm_export.recipe import load_recipe
from edkm_export.verify.artifact import Artifact
from edkm_export.verify.evaluation import Evaluation, evaluation_windows
from edkm_export.verify.ladder import verify_artifact
from edkm_export.verify.localize import localize
from edkm_export.verify.report import Verdict

pytest.importorskip("coremltools")
pytest.importorskip("onnxruntime")

EXPORTS = [
    ("mistral", "4bit", "swift-transformers"),
    ("qwen2", "6bit", "onnx exact"),
    ("qwen3", "3bit", "logits"),
    ("gemma2", "8bit", "onnx low-memory"),
    ("gemma3", "4bit", "logits"),
    ("phi3", "4bit-per-tensor", "onnx exact"),
    ("gpt2", "4bit", "logits"),
    ("qwen2", "dense", "logits"),
    ("llama", "2bit", "onnx exact"),
    ("qwen3", "4bit", "swift-transformers"),
]


def export(checkpoint: Checkpoint, form: str, folder: Path) -> Artifact:
    if form.startswith("onnx"):
        from converters.onnx.artifact import open_artifact as open_onnx
        from converters.onnx.bundle import write_bundle as write_onnx
        from converters.onnx.plan import plan_onnx

        write_onnx(checkpoint, plan_onnx(checkpoint, runtime=form.split()[1]), folder)
        return open_onnx(folder)
    from converters.coreml.artifact import open_artifact
    from converters.coreml.bundle import write_bundle
    from converters.coreml.export_plan import plan_export

    return open_artifact(
        write_bundle(checkpoint, plan_export(checkpoint, interface=form, sequence_length=32), folder, "model")
    )


@pytest.mark.slow
@pytest.mark.parametrize(("family", "recipe", "form"), EXPORTS, ids=map(" ".join, EXPORTS))
def test_unharmed_export_passes(family, recipe, form, held_out, tmp_path):
    kind, arguments = CASES[family]
    model = build_case(kind, {**arguments, "vocab_size": 320})  # 320: what the tokenizer of the tests needs
    folder = save(model.half(), tmp_path / "model")
    checkpoint = palettized_folder(folder, load_recipe(recipe), tmp_path / "model.pt")
    (tmp_path / "export").mkdir()
    artifact = export(checkpoint, form, tmp_path / "export")
    evaluation = Evaluation(held_out, "words", tokens=256, continuation=8)
    report = verify_artifact(checkpoint, artifact, evaluation)
    failed = [f"{rung.id}: {rung.detail}" for rung in report.rungs if rung.verdict is Verdict.FAIL]
    assert report.verdict is Verdict.PASS, failed
    windows = evaluation_windows(checkpoint, evaluation, load_hard_tokenizer(checkpoint), artifact.context)
    strictest = artifact.executions[0].id
    fault = localize(load_hard_model(checkpoint), artifact, strictest, "float32", windows[0])
    assert fault.module == "", fault
