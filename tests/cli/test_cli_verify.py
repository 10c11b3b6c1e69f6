from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from folders import snapshot

pytest.importorskip("coremltools")


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("form", ["bundle", "package"])
def test_bundle_or_package(edkm, tiny_export, work, form):
    result = edkm("verify", tiny_export.model, getattr(tiny_export, form), "--tokens", 64)
    assert result.status == 0 and "PASS" in result.out and "29 of 29" in result.out
    assert snapshot(work) == {}  # no report unless it is asked for


def test_report_folder_is_made(edkm, tiny_export):
    result = edkm("verify", tiny_export.model, tiny_export.bundle, "--tokens", 64, "--report", "a/b")
    assert result.status == 0
    assert json.loads(Path("a/b/report.json").read_text())["verdict"] == "PASS"
    assert "a/b/report.md" in result.out


def test_progress_goes_to_standard_error(edkm, tiny_export):
    result = edkm("verify", tiny_export.model, tiny_export.bundle, "--tokens", 64)
    assert "reading the package" in result.err and "reading the package" not in result.out


def test_missing_package(edkm, tiny_export):
    result = edkm("verify", tiny_export.model, "gone.mlpackage")
    assert result.status == 2 and result.message == "gone.mlpackage: no such package."


def test_missing_checkpoint(edkm, tiny_export):
    result = edkm("verify", "gone.pt", tiny_export.bundle)
    assert result.status == 2 and result.message.startswith("gone.pt: no such file")


def test_folder_without_a_package(edkm, tiny_export, work):
    result = edkm("verify", tiny_export.model, work)
    assert result.status == 2
    assert result.message == f"{work}: expected an .mlpackage, or a folder with one in it; found 0."


def test_folder_with_two_packages(edkm, tiny_export, work):
    for name in ("a", "b"):
        shutil.copytree(tiny_export.package, work / f"{name}.mlpackage")
    assert "found 2" in edkm("verify", tiny_export.model, work).message


def test_report_folder_that_is_a_file(edkm, tiny_export):
    Path("report").write_text("precious")
    result = edkm("verify", tiny_export.model, tiny_export.bundle, "--report", "report")
    assert result.status == 2 and result.message == "report: is a file; --report takes a folder."
    assert Path("report").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--original", "/gone/model"], "/gone/model: no such file or folder"),
        (["--text", "gone.txt"], "gone.txt: no such text file"),
    ],
    ids=["original", "text"],
)
def test_what_is_asked_for_must_be_there(edkm, tiny_export, arguments, named):
    result = edkm("verify", tiny_export.model, tiny_export.bundle, *arguments)
    assert result.status == 2 and result.message.startswith(named)


def test_original_of_another_family_of_shapes(edkm, tiny_export, small_folder):
    """The wrong float model: its vocabulary does not even hold the tokens."""
    result = edkm("verify", tiny_export.model, tiny_export.bundle, "--tokens", 64, "--original", small_folder)
    assert result.status == 2 and str(small_folder) in result.message


def test_package_of_another_program_is_a_failure(edkm, tiny_export, tmp_path):
    """A package that is sound, but has another interface than whole-sequence logits."""
    import coremltools as ct
    import torch

    traced = torch.jit.trace(torch.nn.Linear(4, 4), torch.zeros(1, 4))
    ct.convert(traced, inputs=[ct.TensorType("x", (1, 4))], skip_model_load=True).save(
        str(tmp_path / "x.mlpackage")
    )
    result = edkm("verify", tiny_export.model, tmp_path / "x.mlpackage", "--tokens", 64, "--report", "report")
    assert result.status == 1 and "FAIL" in result.out
    assert "only packages with whole-sequence logits can be verified" in Path("report/report.md").read_text()
