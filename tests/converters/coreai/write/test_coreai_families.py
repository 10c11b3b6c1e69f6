"""Every family as a Core AI model, read back and run by Apple's runtime against transformers' own model."""

from __future__ import annotations

import pytest
import torch

from converters.coreai.backend import missing_backend
from edkm_export.artifact.metrics import divergence
from edkm_export.reference.hard_model import load_hard_model
from tests.helpers.odd_families import EXPORTED
from tests.helpers.onnx_models import family_checkpoint

if missing_backend():
    pytest.skip(f"not run: {missing_backend()}", allow_module_level=True)

from converters.coreai.read.asset import load_asset
from converters.coreai.read.running import RunningModel
from converters.coreai.read.session import CoreAISession
from converters.coreai.write.asset_file import write_asset
from converters.coreai.write.export_plan import plan_coreai

# The rest takes a quarter of a minute each.
CASES = [case if case == "qwen3" else pytest.param(case, marks=pytest.mark.slow) for case in EXPORTED]


@pytest.mark.parametrize("case", CASES)
def test_family(case, tmp_path):
    made = family_checkpoint(case)
    plan = plan_coreai(made)
    write_asset(made, plan, tmp_path / "model.aimodel")
    asset = load_asset(tmp_path / "model.aimodel")
    palettized, dense = asset.palettized(), asset.dense()
    for name, tensor in made.palettized.items():
        assert palettized[name].same_bits(tensor), name
    for name, tensor in made.dense.items():
        assert name not in dense or torch.equal(dense[name], tensor.half()), name
    assert abs(asset.constants_size_bytes / plan.weights_size_bytes - 1) < 0.05  # small constants count here
    text = torch.randint(made.config["vocab_size"], (24,), generator=torch.Generator().manual_seed(0))
    session = CoreAISession(RunningModel(asset))
    found = torch.cat([session.feed(piece) for piece in text.split([10, 1, 13])])
    with torch.no_grad():
        expected = load_hard_model(made)(text[None]).logits[0]
    # Random weights make flat distributions, and float16 logits of up to 30 are rounded by 0.01.
    assert divergence([(expected, found)]).kl_mean < 1e-3
