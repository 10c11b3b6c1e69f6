"""Embedding models through the commands: palettize, inspect, onnx, coreml, verify, and what takes language models."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from edkm_export import checkpoint
from edkm_export.verify.report import Report
from tests.helpers.embedding_models import CASES, edited, write_folder

pytest.importorskip("onnxruntime")

TOKENS = ("--tokens", 400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(CASES["embeddinggemma"], tmp_path_factory.mktemp("cli") / "gemma")


@pytest.fixture
def made(folder, work, edkm, held_out) -> Path:
    Path("text").write_text(held_out, encoding="utf-8")
    result = edkm("palettize", folder, "--calibration", "text", "--calibration-tokens", 200, "--bits", 6)
    assert result.status == 0, result.err
    return work / "model.pt"


def test_whole_job(made, folder, edkm):
    """Calibration reaches every linear layer; the folder holds what a browser needs, the card says how."""
    held = checkpoint.load(made)
    assert held.embedding.prompts == CASES["embeddinggemma"].prompts
    assert {"dense.0.weight", "model.embed_tokens.weight"} <= held.palettized.keys()
    assert held.palettized["dense.0.weight"].n_bits == 8  # as an output head
    assert held.provenance["calibration"]["tokens"] >= 100
    result = edkm("onnx", made, *TOKENS)
    assert result.status == 0, result.err
    out = Path("model-onnx")
    report = Report.model_validate_json((out / "report.json").read_text())
    assert (report.faithful_export.value, report.quality.value) == ("PASS", "WITHIN")
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "feature-extraction" and "sentence-transformers" in front["tags"]
    assert "task: search \\| query: " in card and "40 channels: mean, 2 dense layers, normalized" in card
    assert "generate" not in result.out
    again = edkm("verify", made, out, *TOKENS)
    assert again.status == 0 and "cosine" in again.out


@pytest.mark.slow
def test_core_ml(made, edkm):
    pytest.importorskip("coremltools")
    result = edkm("coreml", made, "--interface", "embedding", "--sequence-length", 32, *TOKENS)
    assert result.status == 0, result.err
    report = Report.model_validate_json(Path("model-coreml/report.json").read_text())
    assert report.faithful_export.value == "PASS"
    assert [rung.id for rung in report.rungs][-3:] == [
        "execution-float32",
        "execution-rounded",
        "execution-apple",
    ]
    assert edkm("inspect", "model-coreml").status == 0


def test_inspect(made, folder, edkm):
    """The account names the files of sentence-transformers; the checkpoint says what it is."""
    result = edkm("inspect", folder)
    assert result.status == 0 and "sentence-transformers folder" in result.out
    told = edkm("inspect", made)
    assert told.status == 0 and "mean, 2 dense layers, normalized" in told.out
    edkm("onnx", made, "--no-verify")
    assert edkm("inspect", "model-onnx").status == 0


def test_dry_run(made, edkm):
    result = edkm("onnx", made, "--dry-run")
    assert result.status == 0 and "embedding" in result.out
    assert not Path("model-onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "{made}", "--prompt", "a"), "is an embedding model"),
        (("train", "{folder}", "--data", "text", "-o", "run"), "is an embedding model"),
        (("onnx", "{made}", "--interface", "decoder"), "gives no logits"),
        (("coreml", "{made}", "--interface", "neural-engine"), "gives no logits"),
        (("onnx", "{made}", "--prompt", "a"), "is for language models"),
        (("compare", "{made}", "{made}", "--text", "text"), "is an embedding model"),
    ],
)
def test_what_takes_language_models(made, folder, edkm, arguments, words):
    before = {path.name for path in Path().iterdir()}
    result = edkm(*(each.format(made=made, folder=folder) for each in arguments))
    assert result.status == 2 and words in result.message
    assert {path.name for path in Path().iterdir()} == before


def test_a_language_model_makes_no_embeddings(tiny_checkpoint, edkm, work):
    result = edkm("onnx", tiny_checkpoint.path, "-o", "out", "--interface", "embedding")
    assert result.status == 2 and "holds a language model" in result.message


def test_an_encoder_without_the_files(work, edkm):
    """A bare BERT says no pooling, so it is no embedding model."""
    bare = write_folder(CASES["minilm"], work / "bare")
    (bare / "modules.json").unlink()
    result = edkm("palettize", bare)
    assert result.status == 2 and "model type 'bert' cannot be exported yet" in result.message


def test_several_poolings_are_refused(work, edkm):
    folder = write_folder(CASES["minilm"], work / "two")
    edited(folder, "1_Pooling/config.json", pooling_mode_max_tokens=True)
    result = edkm("palettize", folder)
    assert result.status == 2 and "joins several poolings (max, mean)" in result.message
    assert not Path("model.pt").exists()


@pytest.mark.parametrize(
    ("pooling", "words"),
    [
        ("max", "model.pt: embedding.pooling"),
        (["mean"], "embedding.pooling"),
        ("cls", "sha256 of its 'embedding' part"),
    ],
)
def test_damaged_settings_of_a_checkpoint(made, edkm, pooling, words):
    import torch

    contents = torch.load(made, weights_only=True)
    contents["embedding"]["pooling"] = pooling
    torch.save(contents, made)
    result = edkm("onnx", made)
    assert result.status == 2 and words in result.message
