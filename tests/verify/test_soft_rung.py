"""The rungs of the soft model, with soft weights whose distances are known beforehand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from edkm_export.errors import InputError
from edkm_export.recipe import load_recipe
from edkm_export.reference.hard_model import load_hard_model
from edkm_export.reference.soft_model import SoftWeights, load_soft_model
from edkm_export.reference.source import Source, load_model
from edkm_export.verify.html import report_page
from edkm_export.verify.inputs import VerificationInputs
from edkm_export.verify.junit import junit
from edkm_export.verify.ladder import count_stages, verify_artifact
from edkm_export.verify.report import Report, Rung, Verdict
from edkm_export.verify.write import markdown
from tests.helpers.exports import palettized_folder
from tests.helpers.odd_families import CASES, build_case
from tests.helpers.odd_models import save

pytest.importorskip("coremltools")

from converters.coreml.read.artifact import open_artifact


@pytest.fixture
def climb(tiny_export, tiny_llama, held_out) -> Any:
    """The ladder of a checkpoint that says it was trained."""
    made = dataclasses.replace(tiny_export.checkpoint, provenance={"training": {"steps": 1}})

    def run(**options: Any) -> Report:
        evaluation = VerificationInputs(
            held_out, "words", tokens=128, **{"original": Source.parse(str(tiny_llama)), **options}
        )
        names: list[str] = []
        artifact = open_artifact(tiny_export.package)
        report = verify_artifact(
            made,
            artifact,
            evaluation,
            predicted_size_bytes=tiny_export.weights_size_bytes,
            advance=names.append,
        )
        assert len(names) == count_stages(artifact, evaluation)
        return report

    return run


def rungs(report: Report) -> dict[str, Rung]:
    return {rung.id: rung for rung in report.rungs}


def test_soft_weights_of_the_original(climb, tiny_llama):
    """Then training left nothing, and all of the distance is rounding."""
    original = load_model(Source.parse(str(tiny_llama)), torch.float32).state_dict()

    def weights() -> Any:
        made = (name for name in original if name.endswith("_proj.weight") or "embed" in name)
        return ((name, original[name]) for name in made)

    report = climb(soft=SoftWeights("made up", weights))
    found = rungs(report)
    assert found["soft"].verdict is found["hardening"].verdict is Verdict.REPORTED
    # the same float16 weights; SDPA against eager attention measured 5e-12
    assert found["soft"].measures["kl_max"] < 1e-9
    assert found["soft"].measures["perplexity_ratio"] == pytest.approx(1, abs=1e-6)
    whole = found["palettization"].measures
    assert found["hardening"].measures["kl_mean"] == pytest.approx(whole["kl_mean"])
    assert found["hardening"].measures["perplexity_ratio"] == pytest.approx(whole["perplexity_ratio"])
    assert found["soft"].detail.endswith("; made up")
    assert list(report.perplexities)[:3] == ["original", "trained soft model", "hard PyTorch"]
    assert report.faithful_export is Verdict.PASS
    assert "| trained soft model | original float model | **REPORTED** | none |" in markdown(report)
    assert '<span class="chip REPORTED">REPORTED</span>' in report_page(report)
    assert 'skipped="2"' in junit(report)  # the two that need a Mac or a cache


def test_soft_weights_that_are_hard(climb, tiny_checkpoint):
    """Then rounding costs nothing, and all of the distance is training."""
    report = climb(
        soft=SoftWeights("made up", lambda: ((n, t.decode()) for n, t in tiny_checkpoint.palettized.items()))
    )
    found = rungs(report)
    assert found["hardening"].measures["kl_max"] == 0
    assert found["soft"].measures["kl_mean"] == found["palettization"].measures["kl_mean"]


def test_without_the_original_rounding_is_still_measured(climb):
    found = rungs(climb(soft=SoftWeights("made up", lambda: iter(())), original=None))
    assert found["soft"].verdict is Verdict.NOT_RUN
    assert found["soft"].detail == "no original to compare with: it was not given"
    assert found["hardening"].verdict is Verdict.REPORTED


def test_soft_model_that_is_not_there(climb):
    found = rungs(climb(soft_missing="runs/1: holds no checkpoints of the run"))
    assert found["soft"].verdict is Verdict.NOT_RUN and "hardening" not in found
    assert found["soft"].detail == "runs/1: holds no checkpoints of the run"


def broken() -> Any:
    raise InputError("runs/1: its weight is of another run.")
    yield


def test_soft_weights_that_turn_out_to_be_wrong(climb):
    soft = SoftWeights("made up", broken)
    found = rungs(climb(soft=soft))
    assert found["soft"].verdict is Verdict.NOT_RUN and "of another run" in found["soft"].detail
    with pytest.raises(InputError, match="of another run"):
        climb(soft=soft, soft_required=True)


def test_weights_that_the_model_holds_turned(tmp_path):
    """GPT-2's are [in, out] in the model and [out, in] in a checkpoint."""
    kind, arguments = CASES["gpt2"]
    folder = save(build_case(kind, {**arguments, "vocab_size": 320}).half(), tmp_path / "model")
    made = palettized_folder(folder, load_recipe("4bit"), tmp_path / "model.pt")
    soft = SoftWeights("made up", lambda: ((n, t.decode()) for n, t in made.palettized.items()))
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(load_soft_model(made, soft)(tokens).logits, load_hard_model(made)(tokens).logits)
