"""The plugin at work, on a sample of coremltools' tests in a process of its own; and what it takes for wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("coremltools")

from edkm_export.errors import InputError, PackageError, UnsupportedOpError
from tests.coremltools_suite.host import Mismatch, compare
from tests.coremltools_suite.outcome import outcome_of
from tests.coremltools_suite.predictor import Diary, Predictor
from tests.helpers.paths import ROOT


@pytest.mark.coremltools
def test_sample(tmp_path):
    results = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "benchmarks.coremltools_suite", "converters/mil/mil/ops/tests/iOS18"]
    command += ["--sample", "100", "--workers", "1", "--results", str(results), "--precision", "rounded"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    kinds = [json.loads(line)["kind"] for line in results.read_text().splitlines()]
    assert kinds.count("predicted") > 10
    assert "| passed, with a prediction |" in done.stdout


@pytest.fixture
def diary(monkeypatch):
    diary = Diary(predictions=1)
    monkeypatch.setattr(Predictor, "diary", diary)
    return diary


def test_programs_with_float16_are_compared_at_our_tolerance(diary):
    made = np.ones(3, np.float32)
    with pytest.raises(AssertionError):
        compare(made, made + 0.004, atol=1e-4)  # of a float32 program
    with pytest.raises(Mismatch):
        compare(made, made + 0.1, atol=0.5)  # the suite's own tolerance is never wider than ours
    diary.half.append(made)
    compare(made, made + 0.004, atol=1e-4)
    with pytest.raises(Mismatch):
        compare(made, made + 0.02, atol=0.5)


@pytest.mark.parametrize(
    ("error", "fault", "kind"),
    [
        (Mismatch("x"), None, "wrong"),
        (AssertionError("x"), None, "wrong"),
        (UnsupportedOpError("p: function main: new 'y' (line 3): no"), ..., "refused"),
        (PackageError("x"), ..., "package error"),
        (KeyError("x"), ..., "untyped error"),
        (RuntimeError("x"), InputError("index 3 is out of range for an axis of size 2"), "undefined"),
    ],
)
def test_outcomes(diary, error, fault, kind):
    diary.fault = error if fault is ... else fault
    report = SimpleNamespace(passed=False, skipped=False, nodeid="test")
    assert outcome_of(report, error, diary)[0] == kind


def test_an_error_before_any_prediction_is_not_the_interpreters():
    report = SimpleNamespace(passed=False, skipped=False, nodeid="test")
    assert outcome_of(report, ValueError("conversion"), Diary())[0] == "not reached"
    assert outcome_of(SimpleNamespace(passed=True, skipped=False), None, Diary())[0] == "passed"


def test_known_differences_are_counted_apart(diary):
    name = "x.py::TestStack::test_stack_dynamic_range_dim[dim=1]"
    report = SimpleNamespace(passed=False, skipped=False, nodeid=name)
    kind, reason = outcome_of(report, AssertionError("DID NOT RAISE"), diary)
    assert kind == "known" and "the interpreter computes" in reason
