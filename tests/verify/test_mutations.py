"""The verifier is verified: every harmful change of an artifact fails, and every harmless one passes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edkm_export.artifact.protocol import Artifact
from edkm_export.checkpoint import Checkpoint
from edkm_export.verify.inputs import VerificationInputs
from edkm_export.verify.ladder import verify_artifact
from edkm_export.verify.report import Verdict
from tests.faults.coreml_mutations import COREML_MUTATIONS, COREML_STATE_MUTATIONS
from tests.faults.mutation import Mutation
from tests.faults.onnx_mutations import ONNX_MUTATIONS
from tests.helpers.sampling import sampled

pytest.importorskip("coremltools")
pytest.importorskip("onnxruntime")

from converters.coreml.read import artifact as coreml
from converters.onnx.read import artifact as onnx


@pytest.fixture(scope="module")
def tiny_onnx(tiny_checkpoint, tmp_path_factory) -> Path:
    """The trained Llama as an ONNX folder, to be read only."""
    from converters.onnx.write.bundle import write_bundle
    from converters.onnx.write.export_plan import plan_onnx

    folder = tmp_path_factory.mktemp("tiny-onnx")
    write_bundle(tiny_checkpoint, plan_onnx(tiny_checkpoint), folder)
    return folder


@pytest.fixture(scope="module")
def tiny_stateful(tiny_checkpoint, tmp_path_factory) -> Path:
    """The trained Llama as a package with its cache in states, to be read only."""
    from converters.coreml.write.bundle import write_bundle
    from converters.coreml.write.export_plan import plan_export

    plan = plan_export(tiny_checkpoint, interface="swift-transformers", sequence_length=64)
    return write_bundle(tiny_checkpoint, plan, tmp_path_factory.mktemp("tiny-stateful"), "model")


def check(mutation: Mutation, checkpoint: Checkpoint, artifact: Artifact, text: str) -> None:
    # two windows; the faults are large, so that more would only take time
    evaluation = VerificationInputs(
        text, "words", tokens=128, continuation=8, localize=mutation.module is not None
    )
    report = verify_artifact(checkpoint, artifact, evaluation)
    failed = [f"{rung.id}: {rung.detail}" for rung in report.rungs if rung.verdict is Verdict.FAIL]
    assert report.faithful_export is (Verdict.FAIL if mutation.harmful else Verdict.PASS), failed
    if mutation.module is not None:
        assert [fault.module for fault in report.faults] == [mutation.module]


@pytest.mark.parametrize("mutation", sampled(COREML_MUTATIONS, 4), ids=str)
def test_package(mutation, tiny_export, held_out, tmp_path):
    package = Path(shutil.copytree(tiny_export.package, tmp_path / "model.mlpackage"))
    mutation.apply(package, tiny_export.checkpoint)
    check(mutation, tiny_export.checkpoint, coreml.open_artifact(package), held_out)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", sampled(COREML_STATE_MUTATIONS, 4), ids=str)
def test_stateful_package(mutation, tiny_stateful, tiny_checkpoint, held_out, tmp_path):
    package = Path(shutil.copytree(tiny_stateful, tmp_path / "model.mlpackage"))
    mutation.apply(package, tiny_checkpoint)
    check(mutation, tiny_checkpoint, coreml.open_artifact(package), held_out)


@pytest.mark.parametrize("mutation", sampled(ONNX_MUTATIONS, 4), ids=str)
def test_graph(mutation, tiny_onnx, tiny_checkpoint, held_out, tmp_path):
    folder = Path(shutil.copytree(tiny_onnx, tmp_path / "folder"))
    mutation.apply(folder, tiny_checkpoint)
    check(mutation, tiny_checkpoint, onnx.open_artifact(folder), held_out)


def test_there_are_enough_of_every_kind():
    suites = (COREML_MUTATIONS, COREML_STATE_MUTATIONS, ONNX_MUTATIONS)
    harmful = [mutation for mutations in suites for mutation in mutations if mutation.harmful]
    assert len(harmful) >= 30
    assert {mutation.kind for mutation in harmful} == {
        "bytes",
        "ops",
        "attributes",
        "names",
        "shapes",
        "states",
        "order",
    }
    for mutations in suites:
        assert len({str(mutation) for mutation in mutations}) == len(mutations)
