from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("coremltools")

pytestmark = pytest.mark.usefixtures("work")


def test_checkpoint_and_its_package_are_the_same_model(edkm, tiny_export, dense_export, work):
    result = edkm(
        "compare", tiny_export.model, tiny_export.bundle, dense_export.model,
        "--tokens", 128, "--json", "-o", "page.html",
    )  # fmt: skip
    assert result.status == 0, result.err
    original, hard, package, dense = json.loads(result.out.rpartition("page: ")[0])
    assert original["name"] == "original" and original["distance"] is None
    # the package computes what the checkpoint does, to float32 rounding and float16 tables
    assert package["perplexity"]["value"] == pytest.approx(hard["perplexity"]["value"], rel=1e-3)
    assert package["bits_per_weight"] == pytest.approx(hard["bits_per_weight"], rel=0.02)
    # nothing is palettized in the dense one: it is the original in float16
    assert dense["distance"]["kl_median"] < 1e-6 < hard["distance"]["kl_median"]
    assert dense["bits_per_weight"] == 16
    page = (work / "page.html").read_text(encoding="utf-8")
    assert "Size against quality" in page and page.count("<tr>") >= 5
    assert 'aria-label="Perplexity against size' in page
    assert len(page.encode()) < 3_000_000


def test_table_for_people(edkm, tiny_export):
    result = edkm("compare", tiny_export.model, "--tokens", 64)
    assert result.status == 0 and "original" in result.out and "±" in result.out


def test_missing_original_is_said(edkm, tiny_export):
    result = edkm("compare", tiny_export.bundle, "--tokens", 64)
    assert result.status == 0
    assert "NOT RUN: distance from the original: no checkpoint is among them" in result.err


def test_models_of_different_tokenizers(edkm, tiny_export, small_export):
    result = edkm("compare", tiny_export.model, small_export.model, "--tokens", 64)
    assert result.status == 2 and "only models of one tokenizer can be compared" in result.message


def test_output_that_is_there(edkm, tiny_export, work):
    (work / "page.html").write_text("precious")
    result = edkm("compare", tiny_export.model, "--tokens", 64, "-o", "page.html")
    assert result.status == 2 and (work / "page.html").read_text() == "precious"


def test_damaged_package(edkm, tiny_export, tmp_path):
    import shutil

    copy = Path(shutil.copytree(tiny_export.package, tmp_path / "copy.mlpackage"))
    (copy / "Manifest.json").write_text("{")
    result = edkm("compare", copy, "--tokens", 64)
    assert result.status == 2 and "Manifest.json" in result.message


def test_a_checkpoint_that_does_not_say_how_long_its_context_is(edkm, saved):
    result = edkm("compare", saved, saved, "--tokens", 64)
    assert result.status == 2 and str(saved) in result.message
