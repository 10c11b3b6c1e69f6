"""docs/python.md and the notebook do what they say, on the trained fixture."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import edkm_export
from tests.helpers.documents import code_cells, python_blocks, run_cells
from tests.helpers.paths import FIXTURES, ROOT

PAGE = ROOT / "docs" / "python.md"
NOTEBOOK = ROOT / "docs" / "palettize-and-verify.ipynb"


@pytest.fixture
def reader(work) -> Path:
    """A working folder in which the paths of the documents are right."""
    (work / "fixtures").symlink_to(FIXTURES)
    return work


def test_page(reader, capsys):
    blocks = python_blocks(PAGE)
    assert len(blocks) >= 6
    names, _ = run_cells(blocks)
    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"^ *print\(.*\)  # (.*)$", "\n".join(blocks), flags=re.M)
    assert len(promised) == len(printed) == 4
    for line, promise in zip(printed, promised, strict=True):
        assert re.fullmatch(re.escape(promise).replace(re.escape("..."), ".*"), line), (line, promise)
    assert (reader / "model-report" / "report.html").is_file()
    assert isinstance(names["report"], edkm_export.Report)


@pytest.mark.slow
def test_notebook(reader):
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    _, shown = run_cells(code_cells(NOTEBOOK))
    reports = [value for value in shown if isinstance(value, edkm_export.Report)]
    assert reports and all(report.passed and "<iframe" in report._repr_html_() for report in reports)
    assert all("\n" not in repr(value) for value in shown if isinstance(value, edkm_export.Checkpoint))
