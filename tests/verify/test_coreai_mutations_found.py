"""The verifier on Core AI models: every harmful change fails, every harmless one passes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from converters.coreai.backend import missing_backend
from edkm_export import checkpoint
from edkm_export.reference.hard_model import load_hard_model, load_hard_tokenizer
from edkm_export.verify.inputs import VerificationInputs, evaluation_windows
from edkm_export.verify.ladder import verify_artifact
from edkm_export.verify.localize import localize
from edkm_export.verify.report import Verdict
from tests.faults.coreai_mutations import COREAI_MUTATIONS
from tests.helpers.paths import FIXTURES

if missing_backend():
    pytest.skip(f"not run: {missing_backend()}", allow_module_level=True)

from converters.coreai.read.artifact import open_artifact

FOLDER = FIXTURES / "coreai"
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 4


@pytest.mark.parametrize("mutation", COREAI_MUTATIONS, ids=str)
def test_model(mutation, tmp_path):
    written = checkpoint.load(FOLDER / "model.pt")
    asset = Path(shutil.copytree(FOLDER / "model.aimodel", tmp_path / "model.aimodel"))
    mutation.apply(asset, written)
    evaluation = VerificationInputs(
        TEXT,
        "words",
        tokens=128,
        continuation=8,
        prompts=("The quick",),
        localize=mutation.module is not None,
    )
    report = verify_artifact(written, open_artifact(asset), evaluation)
    failed = [f"{rung.id}: {rung.detail}" for rung in report.rungs if rung.verdict is Verdict.FAIL]
    assert report.faithful_export is (Verdict.FAIL if mutation.harmful else Verdict.PASS), failed
    if mutation.module is not None:
        assert [fault.module for fault in report.faults] == [mutation.module]


def test_localization_finds_nothing_in_what_is_right():
    written = checkpoint.load(FOLDER / "model.pt")
    artifact = open_artifact(FOLDER / "model.aimodel")
    evaluation = VerificationInputs(TEXT, "words", tokens=128)
    windows = evaluation_windows(written, evaluation, load_hard_tokenizer(written), artifact.context)
    fault = localize(load_hard_model(written), artifact, artifact.executions[0].id, "rounded", windows[0])
    assert fault.module == "", fault
