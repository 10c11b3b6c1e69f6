"""edkm-export coreai, and what the other commands make of its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from converters.coreai.backend import missing_backend
from edkm_export import checkpoint
from edkm_export.atomic import MARKER
from tests.helpers.coreai_models import FORMS, saved_checkpoint
from tests.helpers.paths import FIXTURES

needs_coreai = pytest.mark.skipif(bool(missing_backend()), reason=f"not run: {missing_backend()}")
ASSET = FIXTURES / "coreai" / "model.aimodel"


def test_inspect_needs_no_package_of_apple(edkm):
    done = edkm("inspect", ASSET, "--json")
    assert done.status == 0
    shown = json.loads(done.out)
    assert shown["kind"] == "Core AI model" and shown["interface"] == "dynamic"
    assert {row["name"]: row["n_bits"] for row in shown["palettized"]} == {
        name: form[0] for name, form in FORMS.items()
    }
    assert shown["functions"][0]["states"]["keyCache"] == "float16 [2, 1, 2, ?, 8]"
    assert shown["functions"][0]["op_counts"]["primitive.lut_to_dense_v1"] == len(FORMS)


def test_inspect_prints_it(edkm):
    done = edkm("inspect", ASSET)
    assert done.status == 0 and "interface dynamic, context of 64 positions" in done.out
    assert "state keyCache: float16 [2, 1, 2, ?, 8]" in done.out


def test_inspect_refuses_a_damaged_one(edkm, work):
    (work / "model.aimodel").mkdir()
    done = edkm("inspect", "model.aimodel")
    assert done.status == 2 and "main.mlirb: no such file" in done.err


def test_without_apples_packages(edkm, work, monkeypatch):
    saved_checkpoint(work / "model.pt")
    monkeypatch.setattr(
        "converters.coreai.backend.missing_backend", lambda: "Core AI is not installed: pip install X"
    )
    done = edkm("coreai", "model.pt")
    assert done.status == 2 and "pip install X" in done.err
    assert [path.name for path in work.iterdir()] == ["model.pt"]


@needs_coreai
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--interface", "other"], "'other' is not one of 'dynamic', 'neural-engine'"),
        (["--context-length", "1"], "--context-length 1 is outside 2 to 256"),
        (["--context-length", "257"], "--context-length 257 is outside 2 to 256"),
        (["--interface", "neural-engine", "--context-length", "100"], "use one of 256"),
    ],
)
def test_options_that_make_no_sense(edkm, work, options, message):
    saved_checkpoint(work / "model.pt")
    done = edkm("coreai", "model.pt", *options)
    assert done.status == 2 and message in done.err
    assert [path.name for path in work.iterdir()] == ["model.pt"]


@needs_coreai
def test_dry_run(edkm, work):
    saved_checkpoint(work / "model.pt")
    done = edkm("coreai", "model.pt", "--dry-run", "--interface", "neural-engine")
    assert done.status == 0 and "extend_256_64" in done.out and "3-bit-indices" in done.out
    assert [path.name for path in work.iterdir()] == ["model.pt"]


@needs_coreai
@pytest.mark.slow
def test_export_verify_and_generate(edkm, work, tiny_llama, held_out):
    Path("text.txt").write_text(held_out, encoding="utf-8")
    assert edkm("palettize", tiny_llama, "-o", "model.pt").status == 0
    done = edkm("coreai", "model.pt", "--text", "text.txt", "--tokens", 128)
    assert done.status == 0, done.out + done.err
    folder = work / "model-coreai"
    report = json.loads((folder / "report.json").read_text())
    verdicts = {rung["id"]: rung["verdict"] for rung in report["rungs"]}
    for rung in (
        "bytes",
        "size",
        "context",
        "decoding",
        "execution-coreai-twin",
        "execution-coreai",
        "prefill-decode",
        "continuation",
    ):
        assert verdicts[rung] == "PASS", report["rungs"]
    metadata = json.loads((folder / MARKER).read_text())
    language = metadata["language"]
    assert (metadata["metadata_version"], metadata["kind"]) == ("0.2", "llm")
    assert (folder / metadata["assets"]["main"]).is_dir()
    assert language["vocab_size"] == checkpoint.load("model.pt").config["vocab_size"]
    assert language["embedded_tokenizer"] is True and (folder / "tokenizer" / "tokenizer.json").is_file()
    assert language["function_map"] == {"main": ["main"]} and type(language["max_context_length"]) is int
    written = [
        edkm("generate", path, "--prompt", "Once upon a time", "--max-new-tokens", 8).out
        for path in ("model-coreai", "model.pt")
    ]
    assert written[0] == written[1]


@needs_coreai
def test_in_python(work):
    import edkm_export

    made = edkm_export.export(saved_checkpoint(work / "model.pt"), "out", format="coreai", context_length=32)
    assert repr(made).startswith("Exported(out, Core AI for the dynamic engine, ")
    report = made.verify(text=["a b c d e f g h " * 8], tokens=32)
    assert report.faithful_export.value == "PASS"
    assert "<html" in report._repr_html_() or "<div" in report._repr_html_()
