"""No false alarms: unharmed exports of several families and recipes pass, and localization finds nothing in them."""

from __future__ import annotations

import pytest

from edkm_export.reference.hard_model import load_hard_model, load_hard_tokenizer
from edkm_export.verify.inputs import VerificationInputs, evaluation_windows
from edkm_export.verify.ladder import verify_artifact
from edkm_export.verify.localize import localize
from edkm_export.verify.report import Verdict
from tests.faults.unharmed import UNHARMED

pytest.importorskip("coremltools")
pytest.importorskip("onnxruntime")


@pytest.mark.slow
@pytest.mark.parametrize("export", UNHARMED, ids=str)
def test_unharmed_export_passes(export, held_out, tmp_path):
    checkpoint, artifact = export.make(tmp_path)
    evaluation = VerificationInputs(held_out, "words", tokens=256, continuation=8)
    report = verify_artifact(checkpoint, artifact, evaluation)
    failed = [f"{rung.id}: {rung.detail}" for rung in report.rungs if rung.verdict is Verdict.FAIL]
    assert report.faithful_export is Verdict.PASS, failed
    parts = report.sizes[:3]  # indices, LUTs, other parameters: what the checkpoint holds, to the byte
    assert [size.actual_bytes for size in parts] == [size.predicted_bytes for size in parts]
    windows = evaluation_windows(checkpoint, evaluation, load_hard_tokenizer(checkpoint), artifact.context)
    strictest = artifact.executions[0].id
    fault = localize(load_hard_model(checkpoint), artifact, strictest, "float32", windows[0])
    assert fault.module == "", fault
