"""The plugin: makes the tests of the installed coremltools predict, samples them, and writes down how each ended.

Options: `--suite-sample N` keeps about one test in N, drawn by `--suite-seed`; `--suite-precision` sets the precision
of the interpreter; `--suite-results FILE` collects one JSON line a test.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Read by coremltools' tests when they are collected: ML programs only, of every version. Programs of float32 beside
# those of float16 come with INCLUDE_MIL_FP32_UNIT_TESTS=1.
os.environ.setdefault("PYMIL_TEST_TARGETS", "mlprogram")
os.environ.setdefault("RUN_BACKWARD_COMPATIBILITY", "1")

from tests.coremltools_suite import host
from tests.coremltools_suite.outcome import outcome_of
from tests.coremltools_suite.predictor import Diary, Predictor

_COLLECT_EVERY = 50  # tests; a full collection after each conversion takes most of the time of a test


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("coremltools")
    group.addoption("--suite-sample", type=int, default=1, help="keep one test in so many")
    group.addoption("--suite-seed", type=int, default=0, help="draws the sample")
    group.addoption("--suite-precision", default="float32", help="of the interpreter")
    group.addoption("--suite-results", type=Path, help="file for one JSON line a test")


def pytest_configure(config: pytest.Config) -> None:
    host.install()
    Predictor.precision = config.getoption("--suite-precision")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    every, seed = config.getoption("--suite-sample"), config.getoption("--suite-seed")
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        drawn = zlib.crc32(f"{seed}:{item.nodeid}".encode()) % every == 0
        (kept if drawn else dropped).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    Predictor.diary = Diary()
    host.seed()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    decisive = report.when == "call" or (report.when == "setup" and not report.passed)
    if decisive:
        error = call.excinfo.value if call.excinfo is not None else None
        kind, detail = outcome_of(report, error, Predictor.diary)
        report.user_properties.append(("coremltools", {"kind": kind, "detail": detail}))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    found = dict(report.user_properties).get("coremltools")
    if found is not None and report.when != "teardown":
        _write({"test": report.nodeid, "seconds": round(report.duration, 3), **found})


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        why = str(report.longrepr).strip().splitlines()[-1]
        _write({"test": report.nodeid, "seconds": 0.0, "kind": "not collected", "detail": why})


def _write(entry: dict[str, Any]) -> None:
    """In the process that collects the reports, which is the only one that writes."""
    if _Results.path is not None:
        with _Results.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class _Results:
    path: Path | None = None


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        _Results.path = session.config.getoption("--suite-results")
        if _Results.path is not None:
            _Results.path.write_text("", encoding="utf-8")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    _count[0] += 1
    if _count[0] % _COLLECT_EVERY == 0:
        host.collect_garbage()


_count = [0]
