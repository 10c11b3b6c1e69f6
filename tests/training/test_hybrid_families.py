"""Training of families whose layers keep more than keys and values, and what ships of them."""

from __future__ import annotations

import pytest
import torch

from converters.onnx import load_graph
from edkm_export.checkpoint import load
from edkm_export.reference.hard_model import load_hard_model
from edkm_export.reference.source import Source
from edkm_export.training.run import Run
from edkm_export.training.train_config import TrainConfig
from tests.helpers.odd_families import CASES, build
from tests.helpers.odd_models import build_tokenizer
from tests.helpers.onnx_models import export
from tests.helpers.onnx_texts import assert_same_logits
from tests.helpers.paths import FIXTURES

TWO_STEPS = TrainConfig(
    bits=4,
    steps=2,
    batch_size=2,
    context=32,
    calibration_tokens=128,
    eval_tokens=256,
    log_every=1,
    save_every=0,
)


@pytest.mark.skip(reason="not run: not tried on a whole machine yet")
@pytest.mark.slow
@pytest.mark.parametrize("case", ["lfm2", "qwen3_5"])
def test_two_steps_and_an_export(case, tmp_path, monkeypatch):
    kind, arguments = CASES[case]
    monkeypatch.setitem(CASES, case, (kind, {**arguments, "vocab_size": 300}))
    build(case).save_pretrained(tmp_path / "model")
    build_tokenizer(300).save_pretrained(tmp_path / "model")
    source = Source.parse(str(tmp_path / "model"))
    outcome = Run(source, [FIXTURES / "calibration.txt"], tmp_path / "run", TWO_STEPS).complete(device="cpu")
    made = load(outcome.path)
    assert outcome.steps == 2 and made.palettized
    kernels = [
        tensor for name, tensor in made.dense.items() if name.endswith(("conv.weight", "conv1d.weight"))
    ]
    assert kernels and all(tensor.dim() == 3 for tensor in kernels)
    before = dict(build(case).named_parameters())
    moved = [
        name for name, tensor in made.dense.items() if not torch.equal(tensor.float(), before[name].float())
    ]
    assert any("conv" in name for name in moved)  # trained along
    graph = load_graph(export(made, tmp_path / "onnx"))
    assert_same_logits(graph.graph, graph.new_runtime(threads=1).run, load_hard_model(made))
