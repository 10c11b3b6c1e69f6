from __future__ import annotations

import json
import math
from typing import Any

import jsonschema
import pytest

from edkm_export.artifact.metrics import Divergence, Perplexity
from edkm_export.verify.report import (
    SCHEMA_VERSION,
    LayerError,
    Report,
    Rung,
    Size,
    TensorReport,
    Verdict,
    overall,
)
from edkm_export.verify.write import markdown, write_report
from tests.helpers.paths import ROOT


def rung(verdict: Verdict = Verdict.PASS, **changes: Any) -> Rung:
    fields = {
        "id": "bytes",
        "reference": "hard PyTorch",
        "candidate": "decoded artifact",
        "threshold": "equal",
        "why": "conversion computes nothing",
        "detail": "2 of 2 bit-exact",
    }
    return Rung(**{**fields, "verdict": verdict, **changes})


def tensor(index: int, **changes: Any) -> TensorReport:
    fields = {
        "name": f"layers.{index}.weight",
        "shape": [32, 16],
        "n_bits": 4,
        "groups": (2, 1),
        "dim": 1,
        "lut_dtype": "float16",
        "used_centroids": 30,
        "centroids": 32,
        "bits_per_weight": 5.0,
        "bit_exact": True,
        "index_entropy": 3.5,
        "weight_snr_db": 20.0 + index,
    }
    return TensorReport(**{**fields, **changes})


def report(**changes: Any) -> Report:
    fields = {
        "artifact": "model.mlpackage",
        "kind": "coreml",
        "verdict": Verdict.PASS,
        "not_run": ["Apple runtime: needs macOS, this is Linux"],
        "rungs": [rung()],
        "perplexities": {"original": Perplexity(value=12.5, standard_error=0.25, tokens=100)},
        "parameters": 1024,
        "palettized_parameters": 512,
        "bits_per_weight": 4.5,
        "size_bytes": 2_000_000,
        "predicted_size_bytes": 1_990_000,
        "tensors": [tensor(0), tensor(1)],
        "provenance": {"seed": 3},
    }
    return Report(**{**fields, **changes})


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([Verdict.PASS, Verdict.PASS], Verdict.PASS),
        ([Verdict.PASS, Verdict.NOT_RUN], Verdict.PASS),
        ([Verdict.PASS, Verdict.FAIL, Verdict.NOT_RUN], Verdict.FAIL),
        ([Verdict.NOT_RUN, Verdict.FAIL], Verdict.FAIL),
        ([Verdict.NOT_RUN], Verdict.NOT_RUN),
        ([Verdict.PASS, Verdict.REPORTED], Verdict.PASS),
        ([Verdict.REPORTED], Verdict.NOT_RUN),
        ([], Verdict.NOT_RUN),
    ],
)
def test_overall_verdict(verdicts, expected):
    assert overall([rung(verdict) for verdict in verdicts]) is expected


def test_json_reads_back():
    made = report()
    assert Report.model_validate_json(made.model_dump_json()) == made
    assert json.loads(made.model_dump_json())["schema_version"] == SCHEMA_VERSION == 4
    assert json.loads(made.model_dump_json())["rungs"][0]["verdict"] == "PASS"


def test_numbers_that_json_lacks_read_back():
    """An output that overflowed has an infinite divergence: the report of it must be valid JSON."""
    far = Divergence(
        tokens=4,
        kl_mean=math.inf,
        kl_median=0.1,
        kl_p999=math.inf,
        kl_max=math.inf,
        top1_agreement=0,
        near_ties=0,
    )
    made = report(
        rungs=[rung(Verdict.FAIL, measures=far.model_dump())],
        perplexities={"executed": Perplexity(value=math.inf, standard_error=math.nan, tokens=4)},
        tensors=[tensor(0, weight_snr_db=math.inf), tensor(1, weight_snr_db=-math.inf)],
    )

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = made.model_dump_json()
    json.loads(text, parse_constant=refuse)
    found = Report.model_validate_json(text)
    assert found.perplexities["executed"].value == math.inf
    assert math.isnan(found.perplexities["executed"].standard_error)
    assert [row.weight_snr_db for row in found.tensors] == [math.inf, -math.inf]
    assert found.rungs[0].measures["kl_median"] == 0.1
    assert float(found.rungs[0].measures["kl_mean"]) == math.inf


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match="Extra inputs"):
        Report.model_validate({**report().model_dump(), "verdct": "PASS"})


def test_markdown_says_first_what_matters():
    text = markdown(report())
    lines = text.splitlines()
    assert lines[0] == "# Palettization verification of model.mlpackage: PASS"
    assert "- 2 of 2 palettized tensors bit-exact on disk" in lines
    assert "perplexity of original: 12.50 ± 0.25 (100 tokens)" in text
    assert text.index("## Not run") < text.index("- Apple runtime: needs macOS") < text.index("## Ladder")
    assert "| decoded artifact | hard PyTorch | **PASS** | equal | 2 of 2 bit-exact |" in lines
    assert "- decoded artifact: conversion computes nothing." in lines


def test_markdown_when_everything_was_run():
    assert "Everything was run." in markdown(report(not_run=[]))


def test_markdown_lists_the_worst_weights():
    text = markdown(report(tensors=[tensor(index) for index in range(14)]))
    assert "The 10 weights furthest from the original" in text
    assert "layers.9.weight" in text and "layers.10.weight" not in text
    assert text.index("layers.0.weight") < text.index("layers.1.weight")
    assert "All 14 are in report.json." in text


def test_markdown_without_the_original():
    text = markdown(report(tensors=[tensor(0, weight_snr_db=None, bit_exact=None)]))
    assert "## Palettized weights" in text and "| unknown |" in text


def test_markdown_of_a_weight_that_differs():
    text = markdown(report(tensors=[tensor(0, bit_exact=False), tensor(1)]))
    assert "- 1 of 2 palettized tensors bit-exact on disk" in text and "| **no** |" in text


def test_markdown_cells_cannot_break_the_table():
    text = markdown(report(rungs=[rung(detail="a|b\nc")]))
    assert r"a\|b c |" in text


def test_writing_replaces_older_reports(tmp_path):
    write_report(report(), tmp_path)
    write_report(report(verdict=Verdict.FAIL), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    assert Report.model_validate_json((tmp_path / "report.json").read_text()).verdict is Verdict.FAIL
    assert "FAIL" in (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()[0]


# The published schema


SCHEMA = ROOT / "docs" / "report.schema.json"


def test_published_schema_is_that_of_the_code():
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == Report.model_json_schema()


def test_reports_follow_the_published_schema():
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    infinite = report(
        perplexities={"executed": Perplexity(value=math.inf, standard_error=math.nan, tokens=4)},
        tensors=[tensor(0, weight_snr_db=-math.inf, output_snr_db=3.5), tensor(1, weight_snr_db=None)],
        sizes=[Size(part="LUTs", predicted_bytes=None, actual_bytes=3)],
        layer_errors={"hard PyTorch": [LayerError(layer="model.layers.0", snr_db=math.inf)]},
    )
    for made in (report(), infinite):
        jsonschema.validate(json.loads(made.model_dump_json()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**json.loads(report().model_dump_json()), "verdict": "FINE"}, schema)
