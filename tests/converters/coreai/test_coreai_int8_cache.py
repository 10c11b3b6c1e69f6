"""Core AI models whose keys and values are int8 states: what Apple's runtime computes, and faults that must show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from converters.coreai.backend import missing_backend
from edkm_export.errors import ConversionError, PackageError
from edkm_export.reference.hard_model import load_hard_model
from edkm_export.verify.held_keys import Reader
from tests.helpers.onnx_models import family_checkpoint, palettized_checkpoint

if missing_backend():
    pytest.skip(f"not run: {missing_backend()}", allow_module_level=True)

from converters.coreai.read.artifact import CoreAIArtifact, open_artifact
from converters.coreai.read.interface import check_interface
from converters.coreai.write import cache_ops
from converters.coreai.write.asset_file import write_asset
from converters.coreai.write.export_plan import plan_coreai
from converters.coreai.write.lint import lint
from edkm_export.artifact.metrics import divergence
from edkm_export.verify.report import Rung, Verdict
from edkm_export.verify.rungs import execution_rung

TOKENS = torch.randint(3, 90, (60,), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def made():
    return palettized_checkpoint(4)


@pytest.fixture(scope="module")
def model(made):
    return load_hard_model(made)


def written(checkpoint, folder: Path) -> Path:
    path = folder / "model.aimodel"
    write_asset(checkpoint, plan_coreai(checkpoint, kv_cache="int8"), path)
    return path


def opened(path: Path) -> CoreAIArtifact:
    artifact = open_artifact(path)
    assert isinstance(artifact, CoreAIArtifact), artifact
    return artifact


def rung(artifact: CoreAIArtifact, model: torch.nn.Module) -> Rung:
    """Of the twin."""
    execution, reader = artifact.executions[0], Reader(model)
    assert execution.held is not None
    logits = reader.beside(execution.held)(TOKENS)
    distance = divergence(zip(reader.expected, [logits], strict=True))
    return execution_rung(execution, distance, misfit=reader.misfit)


@pytest.fixture(scope="module")
def artifact(made, tmp_path_factory) -> CoreAIArtifact:
    return opened(written(made, tmp_path_factory.mktemp("int8")))


def test_apples_runtime_computes_what_hard_pytorch_reads(artifact, model):
    function = artifact.asset.program.public["main"]
    assert list(function.states) == ["keyCache", "valueCache", "keyScales", "valueScales"]
    assert [kind.element for kind in function.states.values()] == ["int8", "int8", "float16", "float16"]
    assert artifact.kv_cache == "int8"
    found = rung(artifact, model)
    assert found.verdict is Verdict.PASS
    # a scale in float16 is off by 2**-11, and activations by some of these
    assert found.measures["scale_error"] < 0.01 and found.measures["code_error_steps"] < 2
    session, reader = artifact.session(), Reader(model)
    assert session is not None
    parts = torch.cat([session.feed(piece) for piece in TOKENS.split([31, 1, 1, 27])])
    assert divergence([(reader.read(TOKENS, session.held()), parts)]).kl_max < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gemma4", "lfm2"])
def test_families(case, tmp_path):
    """Heads of two sizes in one state, shared keys, and states that stay floats."""
    checkpoint = family_checkpoint(case)
    assert rung(opened(written(checkpoint, tmp_path)), load_hard_model(checkpoint)).verdict is Verdict.PASS


def doubled(x):
    codes, scales = TO_INT8(x)
    return codes, scales * 2


def coarse(x):
    codes, scales = TO_INT8(x)
    return (codes / 2).round().to(torch.int8), scales * 2


TO_INT8 = cache_ops.to_int8


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(doubled, id="read with twice the scale"),
        pytest.param(coarse, id="scales twice too large"),
        pytest.param("exchanged", id="scales of keys and values exchanged"),
    ],
)
def test_faults_fail(fault, made, model, tmp_path, monkeypatch):
    if fault == "exchanged":
        keys, values = cache_ops._SCALES.items()
        monkeypatch.setattr(cache_ops, "_SCALES", {keys[0]: values[1], values[0]: keys[1]})
    else:
        monkeypatch.setattr(cache_ops, "to_int8", fault)
    assert rung(opened(written(made, tmp_path)), model).verdict is Verdict.FAIL


def test_the_static_engine_is_refused(made):
    with pytest.raises(
        ConversionError, match="--kv-cache int8 cannot be had with --interface neural-engine: .*float16"
    ):
        plan_coreai(made, interface="neural-engine", kv_cache="int8")


def test_apples_engines_do_not_take_it(made):
    assert [
        one.severity for one in lint(made, plan_coreai(made, kv_cache="int8")) if one.id == "int8-states"
    ] == ["error"]


def test_bytes_of_a_token(made):
    float16, int8 = (plan_coreai(made, kv_cache=kind).cache_bytes_per_token for kind in ("float", "int8"))
    assert (float16, int8) == (2 * 2 * 2 * 8 * 2, 2 * 2 * 2 * (8 + 2))


def test_a_program_that_is_not_what_it_says(artifact):
    """States of int8 behind metadata that tell of floats."""
    told = artifact.description.model_copy(update={"kv_cache": "float"})
    with pytest.raises(PackageError, match="expected keyCache and valueCache, in this order"):
        check_interface(artifact.asset.program, told)
