from __future__ import annotations

import dataclasses
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edkm_export import checkpoint
from edkm_export.api.artifacts import predicted_size_bytes as predict
from edkm_export.artifact.thresholds import PERPLEXITY_RATIO
from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import CheckpointError, InputError
from edkm_export.reference.source import Source
from edkm_export.verify.inputs import VerificationInputs
from edkm_export.verify.ladder import count_stages, verify_artifact
from edkm_export.verify.report import Report, Rung, Verdict
from edkm_export.verify.write import markdown
from tests.helpers.odd_models import build, save
from tests.helpers.paths import FIXTURES

pytest.importorskip("coremltools")

from converters.coreml.read.artifact import CoreMLArtifact, open_artifact

TEXT = (FIXTURES / "heldout.txt").read_text(encoding="utf-8")


def climb(
    export: Any,
    made: Checkpoint | None = None,
    *,
    predicted_size_bytes: int | None = None,
    advance: Callable[[str], None] | None = None,
    **options: Any,
) -> Report:
    """The ladder, without the original unless it is given."""
    evaluation = VerificationInputs(**{"text": TEXT, "text_name": "words", "tokens": 128, **options})
    checkpoint, artifact = made or export.checkpoint, open_artifact(export.package)
    if predicted_size_bytes is None:
        predicted_size_bytes = predict(checkpoint, artifact)
    return verify_artifact(
        checkpoint, artifact, evaluation, predicted_size_bytes=predicted_size_bytes, advance=advance
    )


def rung(report: Report, name: str) -> Rung:
    return next(rung for rung in report.rungs if rung.id == name)


# Rungs that cannot be run


def test_apple_runtime_is_said_to_be_not_run(tiny_export, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    report = climb(tiny_export)
    assert rung(report, "execution-apple").verdict is Verdict.NOT_RUN
    assert "Apple's Core ML runtime (macOS): needs macOS, this is Linux" in report.not_run
    text = markdown(report)
    assert "- Apple's Core ML runtime (macOS): needs macOS, this is Linux" in text
    assert "| Apple's Core ML runtime (macOS) | hard PyTorch | **NOT RUN** |" in text


def test_missing_original_is_said_to_be_not_run(tiny_export):
    report = climb(tiny_export, original_missing="/gone is not here")
    found = rung(report, "palettization")
    assert found.verdict is report.quality is Verdict.NOT_RUN and report.faithful_export is Verdict.PASS
    assert found.detail == "no original to compare with: /gone is not here"
    assert not report.failed
    assert "original" not in report.perplexities
    assert all(tensor.weight_snr_db is None for tensor in report.tensors)


def test_original_that_cannot_be_loaded_is_said_to_be_not_run(tiny_export, tiny_llama, tmp_path):
    broken = Path(shutil.copytree(tiny_llama, tmp_path / "broken"))
    (broken / "model.safetensors").unlink()
    report = climb(tiny_export, original=Source.parse(str(broken)))
    assert rung(report, "palettization").verdict is Verdict.NOT_RUN
    assert "holds no weights" in rung(report, "palettization").detail


@pytest.fixture
def moved(tiny_llama, tiny_export, edkm, tmp_path) -> Callable[..., Report]:
    """`edkm-export verify` of a checkpoint whose original is a folder that a test may spoil."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "original"))
    provenance = {"base_model": Source.parse(str(folder)).provenance()}
    checkpoint.save(dataclasses.replace(tiny_export.checkpoint, provenance=provenance), tmp_path / "model.pt")
    # alone: the folder that it is from knows the sha256 of another model.pt
    package = shutil.copytree(tiny_export.package, tmp_path / "alone" / "model.mlpackage")

    def run(spoil: Callable[[Path], object], *arguments: object) -> Report:
        spoil(folder)
        report = tmp_path / "report"
        result = edkm(
            "verify",
            tmp_path / "model.pt",
            package,
            "--tokens",
            128,
            "--report",
            report,
            *arguments,
        )
        assert result.status == 0, result.err
        return Report.model_validate_json((report / "report.json").read_text(encoding="utf-8"))

    return run


def test_original_where_it_was_is_found(moved):
    assert rung(moved(lambda folder: None), "palettization").verdict is Verdict.WITHIN


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (shutil.rmtree, "original is not here; name it with --original"),
        (
            lambda folder: save(build("plain").half(), folder),
            "has changed since it was palettized; name the right one with --original",
        ),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has changed since it was palettized"),
    ],
    ids=["gone", "other weights", "no configuration", "no weights"],
)
def test_original_that_is_not_the_right_one_is_said_to_be_not_run(moved, spoil, reason):
    found = rung(moved(spoil), "palettization")
    assert found.verdict is Verdict.NOT_RUN and reason in found.detail


def test_original_that_is_named_is_used(moved, tiny_llama):
    assert rung(moved(shutil.rmtree, "--original", tiny_llama), "palettization").verdict is Verdict.WITHIN


def test_checkpoint_that_does_not_say_where_it_is_from(tiny_export, edkm, tmp_path):
    made = dataclasses.replace(tiny_export.checkpoint, provenance={})
    checkpoint.save(made, tmp_path / "model.pt")
    package = shutil.copytree(tiny_export.package, tmp_path / "alone" / "model.mlpackage")
    result = edkm("verify", tmp_path / "model.pt", package, "--tokens", 64, "--report", tmp_path / "report")
    assert result.status == 0
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "the checkpoint does not say what it was made from; name it with --original" in text


def test_size_is_predicted_from_the_checkpoint(tiny_export):
    found = rung(climb(tiny_export), "size")
    assert found.verdict is Verdict.PASS
    assert found.measures["predicted_bytes"] == tiny_export.weights_size_bytes


# Thresholds


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(1.0, Verdict.PASS), (1.009, Verdict.PASS), (1.02, Verdict.FAIL), (0.98, Verdict.FAIL)],
)
def test_size_may_be_off_by_one_percent(tiny_export, factor, verdict):
    report = climb(tiny_export, predicted_size_bytes=round(tiny_export.weights_size_bytes * factor))
    assert rung(report, "size").verdict is verdict
    assert report.faithful_export is verdict


def test_perplexity_ratio_decides_quality_alone(tiny_export, tiny_llama):
    source = Source.parse(str(tiny_llama))
    report = climb(tiny_export, original=source)
    found = rung(report, "palettization")
    ratio = report.perplexities["hard PyTorch"].value / report.perplexities["original"].value
    assert report.perplexity_ratio == ratio and found.verdict is report.quality is Verdict.WITHIN
    assert report.perplexity_limit == PERPLEXITY_RATIO[4]
    assert report.perplexity_limit_source == "the default for 4 bits, recipe 4bitg16"
    strict = climb(tiny_export, original=source, max_perplexity_ratio=ratio * 0.999)
    assert strict.quality is Verdict.BEYOND and strict.failed and strict.faithful_export is Verdict.PASS
    assert strict.perplexity_limit_source == "--max-perplexity-ratio"
    exact = climb(tiny_export, original=source, max_perplexity_ratio=ratio)
    assert exact.quality is Verdict.WITHIN
    free = climb(tiny_export, original=source, max_perplexity_ratio=None)
    assert (
        free.quality is Verdict.REPORTED and free.perplexity_ratio == ratio and free.perplexity_limit is None
    )


@pytest.mark.parametrize(
    ("precision", "noise", "verdict"),
    [
        # KL of small noise is half its variance: 2e-3 gives 2e-6, 2e-2 gives 2e-4, 0.2 gives 2e-2
        ("float32", 2e-3, Verdict.PASS),
        ("float32", 2e-2, Verdict.FAIL),
        ("rounded", 2e-2, Verdict.PASS),
        ("rounded", 0.2, Verdict.FAIL),
    ],
)
def test_execution_thresholds(tiny_export, monkeypatch, precision, noise, verdict):
    generator = torch.Generator().manual_seed(0)

    interpreted = CoreMLArtifact._interpreted

    def noisy(package: CoreMLArtifact, mode: str) -> Callable[[torch.Tensor], torch.Tensor]:
        execute = interpreted(package, mode)

        def run(tokens: torch.Tensor) -> torch.Tensor:
            logits = execute(tokens)
            logits[..., 1:] += (
                noise * torch.randn(logits[..., 1:].shape, generator=generator) * (mode == precision)
            )
            return logits

        return run

    monkeypatch.setattr(CoreMLArtifact, "_interpreted", noisy)
    report = climb(tiny_export)
    found = rung(report, f"execution-{precision}")
    # the least top-1 agreement may fail as well when tokens are nearly undecided; the divergence is what is tested
    largest = {"float32": 1e-5, "rounded": 1e-3}[precision]
    assert (found.measures["kl_median"] <= largest) == (verdict is Verdict.PASS)
    if verdict is Verdict.FAIL:
        assert found.verdict is Verdict.FAIL and report.faithful_export is Verdict.FAIL


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_output_that_is_not_finite_fails_and_the_report_is_json(tiny_export, monkeypatch, value):
    def broken(_package: Any, _mode: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda tokens: torch.full((len(tokens), 1024), value)

    monkeypatch.setattr(CoreMLArtifact, "_interpreted", broken)
    report = climb(tiny_export)
    for precision in ("float32", "rounded"):
        found = rung(report, f"execution-{precision}")
        assert found.verdict is Verdict.FAIL and found.measures["top1_agreement"] == 0
    assert Report.model_validate_json(report.model_dump_json()).faithful_export is Verdict.FAIL


# The report


def test_report_describes_the_checkpoint(tiny_export):
    report = climb(tiny_export)
    made = tiny_export.checkpoint
    assert report.parameters == made.numel and report.bits_per_weight == made.bits_per_weight
    assert report.palettized_parameters == sum(tensor.numel for tensor in made.palettized.values())
    assert report.size_bytes == sum(
        path.stat().st_size for path in tiny_export.package.rglob("*") if path.is_file()
    )
    assert [tensor.name for tensor in report.tensors] == list(made.palettized)
    for row, tensor in zip(report.tensors, made.palettized.values(), strict=True):
        assert (row.n_bits, row.groups, row.centroids) == (
            tensor.n_bits,
            tensor.groups,
            tensor.groups[0] << tensor.n_bits,
        )
    assert report.provenance["evaluation"] == {"text": "words", "tokens": 128, "context": 64}


def test_report_does_not_tell_where_the_original_lies(tiny_export, tiny_llama):
    report = climb(tiny_export, original=Source.parse(str(tiny_llama)))
    assert str(tiny_llama.parent) not in report.model_dump_json()


@pytest.mark.slow
def test_windows_are_as_long_as_the_package_takes(tiny_export):
    report = climb(tiny_export, tokens=200)
    assert report.provenance["evaluation"]["tokens"] == 192  # three windows of 64
    short = climb(tiny_export, text="Some words.", tokens=200)
    assert short.provenance["evaluation"]["context"] < 64 and short.faithful_export is Verdict.PASS


def test_every_step_is_announced(tiny_export, tiny_llama):
    for localize in (False, True):
        names: list[str] = []
        climb(tiny_export, original=Source.parse(str(tiny_llama)), localize=localize, advance=names.append)
        expected = count_stages(
            open_artifact(tiny_export.package), VerificationInputs("", "", localize=localize)
        )
        assert len(names) == expected == len(set(names))


# Checkpoints and texts that cannot be used


def test_tokenizer_of_another_model(small_export, tiny_checkpoint):
    made = dataclasses.replace(small_export.checkpoint, tokenizer=tiny_checkpoint.tokenizer)
    with pytest.raises(InputError, match=r"its tokenizer gives token \d+, beyond 320"):
        climb(small_export, made)


def test_checkpoint_without_tokenizer(tiny_export):
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        climb(tiny_export, dataclasses.replace(tiny_export.checkpoint, tokenizer={}))


def test_text_of_one_letter(tiny_export):
    with pytest.raises(InputError, match="words: gives 1 token, at least 2 are needed"):
        climb(tiny_export, text="a")


@pytest.mark.parametrize("key", ["vocab_size", "max_position_embeddings", "model_type"])
@pytest.mark.parametrize("value", [None, "many", []])
def test_configuration_that_makes_no_sense(tiny_export, key, value):
    made = dataclasses.replace(tiny_export.checkpoint, config={**tiny_export.checkpoint.config, key: value})
    with pytest.raises((CheckpointError, InputError)):
        climb(tiny_export, made)
