"""Whole graphs in tract, which is written in Rust and shares no code with onnxruntime or onnx."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tract
from numpy.typing import NDArray

from converters.onnx import load_graph
from edkm_export.checkpoint import Checkpoint
from edkm_export.reference.hard_model import load_hard_model
from tests.helpers.odd_families import SAMPLED
from tests.helpers.onnx_models import export, family_checkpoint, palettized_checkpoint
from tests.helpers.onnx_texts import assert_same_logits

RUNTIMES = ("exact", "low-memory")  # `fast` needs operators of onnxruntime, or scales of blocks


class Tract:
    """A graph in tract; sizes stay open."""

    def __init__(self, model: Path, outputs: list[str]) -> None:
        loaded = tract.onnx().load(str(model))
        self._inputs = [loaded.input_name(place) for place in range(loaded.input_count())]
        self._outputs = outputs
        self._runnable = loaded.into_model().into_runnable()

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Inputs by name to outputs by name."""
        results = self._runnable.run([np.ascontiguousarray(feeds[name]) for name in self._inputs])
        return dict(zip(self._outputs, (result.to_numpy() for result in results), strict=True))


def assert_computes(made: Checkpoint, runtime: str, folder: Path, opset: int = 18) -> None:
    """What hard PyTorch does."""
    export(made, folder, runtime=runtime, opset=opset)
    graph = load_graph(folder).graph
    executor = Tract(folder / "onnx" / "model.onnx", list(graph.outputs))
    assert_same_logits(graph, executor.run, load_hard_model(made))


@pytest.mark.parametrize("case", SAMPLED)
@pytest.mark.parametrize(("runtime", "opset"), [("exact", 18), ("low-memory", 23)])
def test_families(case, runtime, opset, tmp_path):
    assert_computes(family_checkpoint(case), runtime, tmp_path / "out", opset)


@pytest.mark.parametrize(
    "n_bits", (*(pytest.param(bits, marks=pytest.mark.slow) for bits in (1, 2, 6, 8)), 3, 4)
)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_widths(n_bits, runtime, tmp_path):
    """Float LUTs of two groups of columns; of vectors, where there are bits to spare."""
    made = palettized_checkpoint(n_bits, groups_in=2, dim=2 if n_bits < 4 else 1)
    assert_computes(made, runtime, tmp_path / "out")
