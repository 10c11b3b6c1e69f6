"""Two steps of training of each family, and what ships of them."""

from __future__ import annotations

import pytest
import torch

from converters.onnx import load_graph
from edkm_export.checkpoint import load
from edkm_export.reference.hard_model import load_hard_model
from edkm_export.reference.source import Source
from edkm_export.training.run import Run
from edkm_export.training.train_config import TrainConfig
from tests.helpers.odd_families import EXPORTED, trainable
from tests.helpers.onnx_models import export
from tests.helpers.onnx_texts import assert_same_logits
from tests.helpers.paths import FIXTURES

TWO_STEPS = TrainConfig(
    bits=4,
    steps=2,
    norm_rate=0.05,  # so that float16 holds the difference
    batch_size=2,
    context=32,
    calibration_tokens=128,
    eval_tokens=256,
    log_every=1,
    save_every=0,
)


@pytest.mark.slow
@pytest.mark.parametrize("case", EXPORTED)
def test_two_steps_and_an_export(case, tmp_path):
    before = {
        name: tensor.half() for name, tensor in trainable(case, tmp_path / "model").state_dict().items()
    }
    source = Source.parse(str(tmp_path / "model"))
    outcome = Run(source, [FIXTURES / "calibration.txt"], tmp_path / "run", TWO_STEPS).complete(device="cpu")
    made = load(outcome.path)
    assert outcome.steps == 2 and made.palettized
    kernels = {name for name in made.dense if name.endswith(("conv.weight", "conv1d.weight"))}
    assert all(made.dense[name].dim() == 3 for name in kernels)
    assert bool(kernels) == (case in ("lfm2", "qwen3_5"))
    moved = {name for name, tensor in made.dense.items() if not torch.equal(tensor.half(), before[name])}
    assert moved and bool(moved & kernels) == bool(kernels)  # what is not palettized is trained along
    graph = load_graph(export(made, tmp_path / "onnx"))
    assert_same_logits(graph.graph, graph.new_runtime(threads=1).run, load_hard_model(made))
