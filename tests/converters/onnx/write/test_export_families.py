"""The graph of every family against transformers' own model."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from converters.onnx import load_graph
from edkm_export.reference.hard_model import load_hard_model
from tests.helpers.family_draws import random_cases
from tests.helpers.odd_families import CASES, EXPORTED, build, build_case, checkpoint_of
from tests.helpers.onnx_models import export, family_checkpoint
from tests.helpers.onnx_texts import assert_same_logits
from tests.helpers.sampling import sampled


@pytest.mark.parametrize("case", sampled(CASES, 2))
def test_dense_decoder_is_transformers_own(case, tmp_path):
    model = build(case)
    made = checkpoint_of(model)
    context = 48 if "longrope" in case else None  # its tables change with the length of the text
    graph = load_graph(export(made, tmp_path / "out", context=context))
    assert_same_logits(graph.graph, graph.new_runtime(threads=1).run, model)


@pytest.mark.parametrize("case", sampled(EXPORTED, 3))
@pytest.mark.parametrize("runtime", ["low-memory", "fast"])
def test_palettized_families_at_the_oldest_opset(case, runtime, tmp_path):
    """The newer ones are in `test_family_cells`. Without optimization MatMulNBits multiplies the very weights."""
    made = family_checkpoint(case)
    graph = load_graph(export(made, tmp_path / "out", runtime=runtime, opset=18))
    assert_same_logits(graph.graph, graph.new_runtime("disabled", 1).run, load_hard_model(made))


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=random_cases())
def test_random_configurations_as_graphs(case):
    model = build_case(*case)
    with torch.no_grad():  # logits of size one, as the threshold is for
        model.get_output_embeddings().weight.mul_(0.1)
    with tempfile.TemporaryDirectory() as folder:
        graph = load_graph(export(checkpoint_of(model), Path(folder) / "out", context=32))
        assert_same_logits(graph.graph, graph.new_runtime(threads=1).run, model)
