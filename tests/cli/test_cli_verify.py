from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.helpers.snapshots import snapshot

pytest.importorskip("coremltools")

pytestmark = pytest.mark.usefixtures("work")


@pytest.mark.parametrize("form", ["bundle", "package"])
def test_bundle_or_package(edkm, tiny_export, work, form):
    result = edkm("verify", tiny_export.model, getattr(tiny_export, form), "--tokens", 64)
    assert result.status == 0 and "PASS" in result.out and "29 of 29" in result.out
    assert snapshot(work) == {}  # no report unless it is asked for


@pytest.fixture
def exported(tiny_export, work) -> Path:
    """A folder that was exported from work/model.pt."""
    shutil.copy(tiny_export.model, work / "model.pt")
    shutil.copytree(tiny_export.bundle, work / "out")
    return work / "out"


@pytest.mark.parametrize("asked", ["out", "out/model.mlpackage"])
def test_model_is_found_by_its_sha256(edkm, exported, asked):
    Path("model.pt").rename("renamed.pt")
    result = edkm("verify", asked, "--tokens", 64)
    assert result.status == 0 and "29 of 29" in result.out
    assert f"{asked} was exported from renamed.pt" in result.err


def test_arguments_in_any_order(edkm, exported):
    result = edkm("verify", exported, "model.pt", "--tokens", 64, "--quiet")
    assert result.status == 0 and result.out.startswith("faithful export PASS")


def test_another_model_is_refused(edkm, exported, saved):
    """Its weights would be said to differ, which is no fault of the export."""
    result = edkm("verify", saved, exported)
    recorded = json.loads((exported / "metadata.json").read_text())["checkpoint"]["sha256"]
    actual = hashlib.sha256(saved.read_bytes()).hexdigest()
    assert result.status == 2 and actual[:12] in result.message and recorded[:12] in result.message


def test_model_that_is_not_found(edkm, exported):
    Path("model.pt").unlink()
    result = edkm("verify", exported)
    assert result.status == 2 and f"edkm-export verify PATH/model.pt {exported}" in result.message


def test_folder_that_does_not_know_its_model(edkm, exported):
    (exported / "metadata.json").unlink()
    result = edkm("verify", exported)
    assert result.status == 2 and f"edkm-export verify MODEL.PT {exported}" in result.message
    assert edkm("verify", "model.pt", exported, "--tokens", 64, "--quiet").status == 0


@pytest.mark.parametrize("paths", [["model.pt"], ["gone"], ["model.pt", "out", "out"]])
def test_other_paths(edkm, exported, paths):
    result = edkm("verify", *paths)
    assert result.status == 2 and result.message


def test_card_tells_what_a_later_verification_found(edkm, exported):
    from edkm_export.model_card import FormatCard, card_verdict, model_card
    from tests.helpers.checkpoint_files import make_checkpoint

    card = model_card(make_checkpoint(), "x", FormatCard("coreml", [], "A model"), "NOT VERIFIED", "not yet")
    (exported / "README.md").write_text(card)
    assert edkm("verify", exported, "--tokens", 64, "--report", exported).status == 0
    found = (exported / "README.md").read_text()
    assert card_verdict(found) == "PASS" and "not yet" not in found and found.startswith(card[:100])
    assert edkm("push", exported, "some-one/x", "--dry-run").status == 0


def test_report_folder_is_made(edkm, tiny_export):
    result = edkm("verify", tiny_export.model, tiny_export.bundle, "--tokens", 64, "--report", "a/b")
    assert result.status == 0
    assert json.loads(Path("a/b/report.json").read_text())["faithful_export"] == "PASS"
    assert "a/b/report.html" in result.out


def test_progress_goes_to_standard_error(edkm, tiny_export):
    result = edkm("verify", tiny_export.model, tiny_export.bundle, "--tokens", 64)
    assert "running hard PyTorch" in result.err and "running hard PyTorch" not in result.out


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
    assert "or a package that edkm-export made" in Path("report/report.md").read_text()


def test_quiet_is_one_line(edkm, tiny_export):
    result = edkm("verify", tiny_export.model, tiny_export.bundle, "--tokens", 64, "--quiet")
    assert result.status == 0 and result.err == ""
    assert re.fullmatch(
        r"faithful export PASS, quality WITHIN: model\.mlpackage: perplexity x[\d.]+, top-1 [\d.]+% against the "
        r"original; 29 of 29 tensors bit-exact; 11 rungs: 8 passed, 3 not run\n",
        result.out,
    )


def damaged(package: Path, folder: Path) -> Path:
    """A copy with one byte less in its file of weights."""
    copy = Path(shutil.copytree(package, folder / "copy.mlpackage"))
    (path,) = copy.rglob("weight.bin")
    path.write_bytes(path.read_bytes()[:-1])
    return copy


def test_quiet_says_what_failed(edkm, tiny_export, tmp_path):
    result = edkm(
        "verify", tiny_export.model, damaged(tiny_export.package, tmp_path), "--tokens", 64, "--quiet"
    )
    assert result.status == 1 and result.out.count("\n") == 1
    told = "faithful export FAIL, quality WITHIN: copy.mlpackage: decoded artifact (bytes on disk): "
    assert result.out.startswith(told)


@pytest.mark.parametrize("harm", [False, True], ids=["intact", "damaged"])
def test_junit(edkm, tiny_export, tmp_path, harm):
    package = damaged(tiny_export.package, tmp_path) if harm else tiny_export.package
    result = edkm("verify", tiny_export.model, package, "--tokens", 64, "--junit", "junit.xml")
    assert result.status == int(harm)
    suite = ElementTree.parse("junit.xml").getroot()
    cases = {case.get("name").split(":")[0]: case for case in suite}
    assert suite.get("tests") == str(len(cases)) and int(suite.get("skipped")) >= 2
    assert (
        cases["soft"].find("skipped").get("message").startswith("the checkpoint was palettized in one shot")
    )
    assert (suite.get("failures") != "0") is harm
    assert (cases["bytes"].find("failure") is not None) is harm
    assert [case.get("name") for case in suite][:2] == ["faithful export", "quality"]
    assert (cases["faithful export"].find("failure") is not None) is harm
    assert cases["quality"].find("system-out").text.startswith("WITHIN: Perplexity is ")


@pytest.mark.parametrize(
    ("arguments", "quality", "status"),
    [
        ([], "WITHIN", 0),
        (["--max-perplexity-ratio", "0.5"], "BEYOND", 1),
        (["--max-perplexity-ratio", "NONE"], "REPORTED", 0),
        (["--max-perplexity-ratio", "preset"], "WITHIN", 0),
    ],
    ids=["default", "user's", "none", "preset"],
)
def test_quality_beyond_its_limit_ends_with_status_1(
    edkm, tiny_export, tiny_llama, arguments, quality, status
):
    result = edkm(
        "verify", tiny_export.model, tiny_export.bundle, "--original", tiny_llama,
        "--tokens", 64, "--quiet", "--junit", "junit.xml", *arguments,
    )  # fmt: skip
    assert result.status == status
    failed = ElementTree.parse("junit.xml").getroot().find("testcase[@name='quality']/failure")
    assert (failed is not None) is (status == 1)
    assert result.out.startswith(f"faithful export PASS, quality {quality}: model.mlpackage: ")


@pytest.mark.parametrize("ratio", ["0", "-1", "nan", "inf", "much"])
def test_limits_that_make_no_sense(edkm, tiny_export, ratio):
    result = edkm("verify", tiny_export.model, tiny_export.bundle, f"--max-perplexity-ratio={ratio}")
    assert result.status == 2 and "a number above 0" in result.err


def test_localize_names_the_module(edkm, tiny_export, tmp_path):
    from tests.faults.coreml_mutations import COREML_MUTATIONS

    mutation = next(one for one in COREML_MUTATIONS if one.name == "missing norm weight")
    copy = Path(shutil.copytree(tiny_export.package, tmp_path / "copy.mlpackage"))
    mutation.apply(copy, tiny_export.checkpoint)
    result = edkm(
        "verify", tiny_export.model, copy, "--tokens", 64, "--localize", "--report", tmp_path / "report"
    )
    assert result.status == 1 and f"first fault: {mutation.module}, " in result.out
    assert mutation.module in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert mutation.module in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
