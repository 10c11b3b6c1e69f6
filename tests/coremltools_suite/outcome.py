"""How a test of the suite ended, as far as the interpreter is concerned."""

from __future__ import annotations

import re

import pytest

from edkm_export.errors import EdkmExportError, InputError, UnsupportedOpError
from tests.coremltools_suite.host import Mismatch
from tests.coremltools_suite.known import known_reason
from tests.coremltools_suite.predictor import Diary, NoProgram

__all__ = ["FAULTS", "outcome_of"]

FAULTS = ("wrong", "package error", "untyped error")
"""The kinds that are faults of the interpreter."""

# What Core ML tells beside predictions: where ops would run, and what its compiler writes.
_CORE_ML_ALONE = (
    "MLComputePlan is not supported",
    "MLModelStructure is not supported",
    ".mlpackage/model.mil",
)


def outcome_of(report: pytest.TestReport, error: BaseException | None, diary: Diary) -> tuple[str, str]:
    """Kind and detail of an outcome.

    Kinds: `predicted` (passed with a prediction), `passed` (passed, never predicts), `skipped`, `expected failure`,
    `refused` (an op that is not supported; the detail names it), `undefined` (an index out of range, which the
    interpreter refuses), `known` (see `known`), `wrong`, `package error` (a typed error of the interpreter), `untyped
    error`, and `not reached` (failed before any prediction, which is no fault of the interpreter).
    """
    if hasattr(report, "wasxfail"):
        return "expected failure", report.wasxfail
    if report.passed:
        return ("predicted", "") if diary.predictions else ("passed", "")
    if report.skipped:
        return "skipped", str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else ""
    text = f"{type(error).__name__}: {error}"
    if (reason := known_reason(report.nodeid, text)) is not None:
        return "known", reason
    if isinstance(error, NoProgram) or any(name in text for name in _CORE_ML_ALONE):
        return "not reached", text
    fault = diary.fault
    if isinstance(fault, InputError) and "Regex pattern did not match" in text:
        return "known", "expects Core ML's words for a refusal; the interpreter refuses, too, in its own"
    if fault is not None and not isinstance(error, (Mismatch, AssertionError)):
        if "expected an ML program" in str(fault):
            return "refused", "a pipeline of models, which is no single program"
        if isinstance(fault, UnsupportedOpError):
            return "refused", _refused(str(fault))
        if isinstance(fault, InputError) and "out of range" in str(fault):
            return "undefined", str(fault)
        kind = "package error" if isinstance(fault, EdkmExportError) else "untyped error"
        return kind, f"{type(fault).__name__}: {fault}"
    if diary.predictions:
        return "wrong", text
    return "not reached", text


def _refused(message: str) -> str:
    """Op and reason out of `PACKAGE: function NAME: OP 'output' (line N): reason`."""
    found = re.search(r"function \S+: (\S+) .*?\(line \d+\): (.*)", message, re.DOTALL)
    return f"{found[1]}: {found[2].strip()}" if found else message
