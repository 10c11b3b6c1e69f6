"""Graphs in every onnxruntime from the oldest that docs/onnx.md names.

Each version lives in an environment of its own; this runs when its marker is chosen:

    EDKM_ONNXRUNTIMES=old/bin/python:new/bin/python  pytest -m onnxruntimes  # pip install onnxruntime==VERSION
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters.onnx import load_graph
from converters.onnx.read.interface import batch_feeds
from edkm_export.reference.hard_model import load_hard_model
from tests.helpers.onnx_models import export, palettized_checkpoint
from tests.helpers.onnx_texts import assert_same_logits

pytestmark = pytest.mark.onnxruntimes

# runtime, opset, standard_ops, optimization: the oldest version. Unoptimized, `fast` multiplies what it holds; 1.22.1
# cannot do that with 8 bits.
OLDEST = {
    ("exact", 18, False, "all"): (1, 15, 1),
    ("exact", 18, False, "disabled"): (1, 15, 1),
    ("exact", 23, False, "all"): (1, 23, 2),
    ("low-memory", 18, False, "all"): (1, 15, 1),
    ("low-memory", 23, False, "all"): (1, 23, 2),
    ("low-memory", 23, False, "disabled"): (1, 23, 2),
    ("fast", 18, False, "disabled"): (1, 23, 2),
    ("fast", 23, False, "disabled"): (1, 23, 2),
    ("fast", 21, True, "disabled"): (1, 19, 2),
}

SCRIPT = """
import sys
import numpy
import onnxruntime
model, optimization, feeds, results = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
if optimization == "disabled":
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
names = [value.name for value in session.get_outputs()]
numpy.savez(results, **dict(zip(names, session.run(names, dict(numpy.load(feeds))))))
"""


def interpreters(oldest: tuple[int, ...]) -> Iterator[str]:
    """Interpreters that EDKM_ONNXRUNTIMES names, of a version and newer ones; that version must be among them."""
    named = os.environ.get("EDKM_ONNXRUNTIMES")
    if not named:
        pytest.fail("EDKM_ONNXRUNTIMES does not say where other onnxruntimes are installed")
    ask = "import onnxruntime; print(onnxruntime.__version__)"
    found = {}
    for python in named.split(os.pathsep):
        told = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
        found[tuple(int(part) for part in told.stdout.strip().split("."))] = python
    assert oldest in found, f"EDKM_ONNXRUNTIMES names no environment with {oldest}"
    yield from (found[version] for version in sorted(found) if version >= oldest)


def executor(python: str, model: Path, optimization: str, work: Path) -> Callable[[Mapping[str, Any]], Any]:
    """Runs a graph in another interpreter, a process for each call."""

    def run(feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        given, results = work / "feeds.npz", work / "results.npz"
        np.savez(given, **feeds)
        command = [python, "-c", SCRIPT, model, optimization, given, results]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return dict(np.load(results))

    return run


@pytest.mark.parametrize(("runtime", "opset", "standard_ops", "optimization"), OLDEST)
def test_versions(runtime, opset, standard_ops, optimization, tmp_path):
    made = palettized_checkpoint(4, int8=True, int4=runtime == "fast" and not standard_ops)
    folder = export(made, tmp_path / "out", runtime=runtime, opset=opset, standard_ops=standard_ops)
    graph, model = load_graph(folder).graph, load_hard_model(made)
    for python in interpreters(OLDEST[runtime, opset, standard_ops, optimization]):
        run = executor(python, folder / "onnx" / "model.onnx", optimization, tmp_path)
        assert_same_logits(graph, run, model)


@pytest.mark.parametrize(("opset", "oldest"), [(18, (1, 22, 1)), (23, (1, 23, 2))])
def test_fast_rounds_activations_and_no_more(opset, oldest, tmp_path):
    """Optimized. Logits, of size one, move by 0.025 in the mean."""
    made = palettized_checkpoint(4, int8=True, int4=True)
    folder = export(made, tmp_path / "out", runtime="fast", opset=opset)
    graph, tokens = load_graph(folder).graph, torch.arange(5, 25)
    feeds = batch_feeds(graph, [tokens], len(tokens))
    with torch.no_grad():
        expected = load_hard_model(made)(tokens[None]).logits[0].numpy()
    for python in interpreters(oldest):
        found = executor(python, folder / "onnx" / "model.onnx", "all", tmp_path)(feeds)["logits"][0]
        assert 0 < np.sqrt(np.square(found - expected).mean()) < 0.05, python
