"""`--kv-cache int8`: the whole job, and the interfaces that cannot hold it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import edkm_export
from edkm_export.errors import ConversionError
from edkm_export.verify.report import Report, Verdict

TOKENS = ("--tokens", 96)


def test_whole_job(edkm, tiny_checkpoint, held_out, work):
    """Export, report, card, inspect, verify alone, and text."""
    shutil.copy(tiny_checkpoint.path, "tiny.pt")
    Path("text").write_text(held_out, encoding="utf-8")
    plan = edkm("onnx", "tiny.pt", "--kv-cache", "int8", "--dry-run")
    assert plan.status == 0 and "int8, " in plan.out and "bytes a token" in plan.out
    result = edkm("onnx", "tiny.pt", "--kv-cache", "int8", "--text", "text", *TOKENS)
    assert result.status == 0, result.err
    report = Report.model_validate_json(Path("tiny-onnx/report.json").read_text(encoding="utf-8"))
    rungs = {rung.id: rung for rung in report.rungs}
    assert rungs["kv-cache"].verdict is Verdict.WITHIN and rungs["kv-cache"].reference == "hard PyTorch"
    assert 1e-6 < rungs["kv-cache"].measures["kl_mean"] < 0.01
    assert f"multiply it by {rungs['kv-cache'].measures['perplexity_ratio']:.4g}" in " ".join(
        result.out.split()
    )
    reading = [name for name, rung in rungs.items() if "reads the artifact's int8" in rung.reference]
    executions = [name for name in rungs if name.startswith("execution-")]
    assert reading == [*executions, "prefill-decode", "continuation"]
    assert {rungs[name].verdict for name in reading} == {Verdict.PASS}
    card = Path("tiny-onnx/README.md").read_text(encoding="utf-8")
    assert "key_scale" in card and "og.Model" not in card and not Path("tiny-onnx/genai_config.json").exists()
    shown = edkm("inspect", "tiny-onnx")
    assert "keys and values are int8" in shown.out and "past_key_values.0-3.key_scale: float32" in shown.out
    assert json.loads(edkm("inspect", "tiny-onnx", "--json").out)["kv_cache"] == "int8"
    written = edkm("generate", "tiny-onnx", "--prompt", "The meaning", "--max-new-tokens", 8)
    expected = edkm("generate", "tiny.pt", "--prompt", "The meaning", "--max-new-tokens", 8)
    assert written.status == 0 and written.out == expected.out  # int8 changes no choice of these eight


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["coreml"], "swift-transformers prescribes float16 keyCache and valueCache"),
        (["coreml", "--interface", "neural-engine"], "Core ML holds states as float16 and as nothing else"),
        (["coreml", "--interface", "logits"], "--interface logits keeps no keys and values"),
        (["coreai", "--interface", "neural-engine"], "StaticShapeEngine prescribes float16"),
    ],
)
def test_refused(edkm, tiny_checkpoint, work, arguments, message):
    result = edkm(arguments[0], tiny_checkpoint.path, "-o", "out", "--kv-cache", "int8", *arguments[1:])
    assert result.status == 2 and message in " ".join(result.err.split())
    assert not any(work.iterdir())


def test_in_python(tiny_checkpoint, work):
    made = edkm_export.export(tiny_checkpoint, "out", format="onnx", kv_cache="int8")
    assert json.loads((made.path / "metadata.json").read_text())["kv_cache"] == "int8"
    with pytest.raises(ConversionError, match="float16"):
        edkm_export.export(tiny_checkpoint, "other", kv_cache="int8")
