"""`edkm-export onnx`: the whole job, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from converters.onnx import load_graph
from edkm_export.checkpoint import Checkpoint
from edkm_export.recipe import uniform_recipe
from edkm_export.verify.report import Report
from tests.helpers.exports import palettized_folder

TOKENS = ("--tokens", 96)


@pytest.fixture(scope="module")
def grids(tiny_llama, tiny_checkpoint, tmp_path_factory) -> dict[str, Checkpoint]:
    """The trained Llama by the grid of its LUTs; at 3 bits on an int4 grid and 4 bits otherwise."""
    path = tmp_path_factory.mktemp("int4") / "model.pt"
    return {
        "float16": tiny_checkpoint,
        "int4": palettized_folder(tiny_llama, uniform_recipe(3, 16, "int4"), path),
    }


def left_nothing(folder: Path) -> bool:
    """True when no file was written but the checkpoint."""
    return {path.name for path in folder.iterdir()} <= {"model.pt", "text"}


@pytest.mark.parametrize(
    ("grid", "runtime"), [("float16", "exact"), ("float16", "low-memory"), ("int4", "fast")]
)
def test_whole_job(edkm, grids, held_out, work, grid, runtime):
    """Default output name, verification against the original, every file that a runtime looks for."""
    shutil.copy(grids[grid].path, "tiny.pt")
    Path("text").write_text(held_out, encoding="utf-8")
    result = edkm("onnx", "tiny.pt", "--runtime", runtime, "--text", "text", *TOKENS)
    folder = work / "tiny-onnx"
    report = Report.model_validate_json((folder / "report.json").read_text(encoding="utf-8"))
    assert result.status == 0, (result.err, report.rungs)
    assert report.artifact == "tiny-onnx" and report.bit_exact_tensors == 29
    assert {path.name for path in folder.iterdir()} >= {
        "config.json", "generation_config.json", "genai_config.json", "metadata.json", "tokenizer.json",
        "onnx", "report.json", "report.md", "report.html",
    }  # fmt: skip
    assert load_graph(folder).profile == runtime
    told = result.out + "".join(path.read_text(encoding="utf-8") for path in folder.glob("report.*"))
    assert "next: edkm-export generate tiny-onnx --prompt 'Once upon a time'" in result.out
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert (
        "Faithful export: **PASS**" in card
        and f"| runtime profile | `{runtime}`" in card
        and str(work) not in card
    )
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "onnx"
    dry = edkm("push", "tiny-onnx", "some-one/tiny", "--dry-run")
    assert dry.status == 0 and "onnx/model.onnx_data" in dry.out, dry.err
    assert ".partial" not in told and str(work) not in told
    rungs = {rung.id: rung.verdict.value for rung in report.rungs}
    ran = ("bytes", "size", "execution-onnxruntime", "execution-onnxruntime-padded", "execution-reference")
    assert {rungs[name] for name in ran} == {"PASS"}, rungs
    assert not any(path.name.startswith(".") for path in work.iterdir())


def test_failed_verification_is_told(edkm, tiny_checkpoint, work):
    """Exit status 1, and the folder is there with its report."""
    result = edkm("onnx", tiny_checkpoint.path, "-o", "out", "--max-perplexity-ratio", 0.5, *TOKENS)
    assert result.status == 1 and "BEYOND" in result.out
    found = json.loads(Path("out/report.json").read_text())
    assert found["quality"] == "BEYOND" and found["faithful_export"] == "PASS"


def test_without_verification(edkm, tiny_checkpoint, work):
    result = edkm("onnx", tiny_checkpoint.path, "-o", "out", "--no-verify")
    assert result.status == 0 and "NOT VERIFIED" in result.out
    assert not list(Path("out").glob("report.*"))
    found = load_graph(Path("out")).palettized()
    assert all(tensor.same_bits(found[name]) for name, tensor in tiny_checkpoint.palettized.items())


def test_overwrite_replaces_a_folder_of_ours(edkm, tiny_checkpoint, work):
    options: tuple[Any, ...] = ("onnx", tiny_checkpoint.path, "-o", "out", "--no-verify")
    assert edkm(*options).status == 0
    Path("out/leftover").write_text("of the old one")
    refused = edkm(*options)
    assert refused.status == 2 and "out" in refused.message and "--overwrite" in refused.message
    assert Path("out/leftover").exists()
    assert edkm(*options, "--overwrite").status == 0 and not Path("out/leftover").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--runtime", "fast"), ("float16 LUTs", "--lut-dtype int8")),
        (("--opset", 5), ("opset", "5")),
        (("--context-length", 0), ("--context-length 0",)),
        (("--context-length", 10**9), ("1000000000", "2 to 512")),
        (("--standard-ops",), ("--runtime fast",)),
        (("--text", "missing.txt"), ("missing.txt",)),
        (("--original", "nowhere"), ("nowhere",)),
    ],
)
def test_refused_before_anything_is_written(edkm, tiny_checkpoint, work, options, told):
    shutil.copy(tiny_checkpoint.path, "model.pt")
    result = edkm("onnx", "model.pt", *options)
    assert result.status == 2 and "Traceback" not in result.err
    assert all(words in result.message for words in told), result.message
    assert left_nothing(work)


def test_checkpoint_of_something_else(edkm, work):
    Path("model.pt").write_bytes(b"garbage")
    result = edkm("onnx", "model.pt")
    assert result.status == 2 and "model.pt" in result.message and left_nothing(work)


def test_nothing_is_left_of_a_job_that_fails(edkm, tiny_checkpoint, work, monkeypatch):
    from converters.onnx.write import bundle

    def fail(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    shutil.copy(tiny_checkpoint.path, "model.pt")
    monkeypatch.setattr(bundle, "write_graph", fail)
    result = edkm("onnx", "model.pt", "--no-verify")
    assert result.status == 2 and "nothing was left behind" in result.message and left_nothing(work)
