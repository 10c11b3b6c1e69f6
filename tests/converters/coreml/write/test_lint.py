"""Device lint: each finding, from the plan alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from converters.coreml.write import lint as lint_module
from converters.coreml.write.export_plan import ExportPlan, plan_export
from converters.coreml.write.lint import lint
from edkm_export.checkpoint import Checkpoint
from edkm_export.device_lint import Finding
from edkm_export.palettization import palettize_model
from edkm_export.recipe import uniform_recipe
from tests.helpers.odd_models import build
from tests.helpers.palettes import random_palette

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def plain() -> Checkpoint:
    model = build("plain")
    config = model.config.to_dict()
    parts = palettize_model(model.half(), uniform_recipe(6, 16))
    return Checkpoint(config=config, palettized=parts.palettized, dense=parts.dense, tied=parts.tied)


def found(checkpoint: Checkpoint, plan: ExportPlan | None = None, **options: Any) -> dict[str, Finding]:
    findings = lint(checkpoint, plan or plan_export(checkpoint, **options))
    for finding in findings:
        assert finding.subject and finding.reason and finding.source and finding.remedy
    return {finding.id: finding for finding in findings}


def with_up(checkpoint: Checkpoint, n_bits: int = 6, **form: Any) -> Checkpoint:
    palette = random_palette((48, 32), n_bits, name=UP, **form)
    return dataclasses.replace(checkpoint, palettized={**checkpoint.palettized, UP: palette})


def test_sound_export_has_notes_only(plain):
    assert found(plain, interface="logits") == {}
    assert {finding.severity for finding in found(plain, interface="neural-engine").values()} == {"note"}


@pytest.mark.parametrize(
    ("name", "severity", "form"),
    [
        ("input-channel-groups", "warning", {"groups": (3, 2)}),
        ("group-size", "note", {"groups": (24, 1)}),
        ("lut-scale", "error", {"groups": (3, 1), "int8": True}),
        ("vector-lut", "warning", {"dim": 2, "groups": (3, 1)}),
        ("vector-lut", "warning", {"n_bits": 8, "dim": 2}),
        ("stateful-4-bit", "warning", {"n_bits": 4}),
    ],
)
def test_forms_of_palettes(plain, name, severity, form):
    finding = found(with_up(plain, **form))[name]
    assert finding.severity == severity and UP in finding.subject


def test_short_vectors_with_one_lut_are_fine(plain):
    assert "vector-lut" not in found(with_up(plain, n_bits=6, dim=2))


def test_flexible_shapes_and_odd_states(plain):
    assert "coremltools issue 2600" in found(plain, sequence_length=40)["flexible-shapes"].source
    assert "8 channels" in found(plain)["state-size"].subject
    assert not {"flexible-shapes", "state-size"} & found(plain, interface="neural-engine").keys()


def test_large_dimensions(plain, monkeypatch):
    monkeypatch.setattr(lint_module, "LARGEST_DIMENSION", 300)
    finding = found(plain)["large-dimension"]
    assert finding.subject == "the vocabulary is 320" and "--interface neural-engine" in finding.remedy
    monkeypatch.setattr("converters.coreml.write.vocabulary.LARGEST_DIMENSION", 300)
    assert "large-dimension" not in found(plain, interface="neural-engine")


def test_large_packages(plain):
    plan = plan_export(plain, interface="neural-engine")
    for size, severity in [(999_999_999, None), (1_500_000_000, "warning"), (2_500_000_000, "error")]:
        finding = found(plain, dataclasses.replace(plan, package_sizes_bytes=(size,))).get("package-size")
        assert (finding.severity if finding else None) == severity


def test_worst_comes_first(plain):
    severities = [
        finding.severity for finding in lint(with_up(plain, 4, groups=(3, 2), int8=True), plan_export(plain))
    ]
    assert severities == sorted(severities, key=["error", "warning", "note"].index)
    assert severities[0] == "error"


def test_dry_run_writes_nothing(edkm, small_export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for interface in ("swift-transformers", "neural-engine", "logits"):
        result = edkm("coreml", small_export.model, "-o", "out", "--interface", interface, "--dry-run")
        assert result.status == 0, result.err
        assert interface in result.out and "MB of weights" in result.out
        assert "device lint" in result.out
    assert list(tmp_path.iterdir()) == []
