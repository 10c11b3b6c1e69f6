"""Language models through conversion and interpreter, and plans that are refused before the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from converters.coreml import load_package
from converters.coreml.write.export_plan import plan_export
from converters.coreml.write.packages import export_packages
from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import ConversionError
from edkm_export.palettization import palettize_model
from edkm_export.recipe import PRESETS, uniform_recipe
from edkm_export.reference.hard_model import load_hard_model
from tests.helpers.layers import WEIGHT, assert_same_bits, form
from tests.helpers.odd_models import CASES, build, inject_outliers
from tests.helpers.sampling import sampled

ct = pytest.importorskip("coremltools")


def exported(model: Any, recipe: Any, folder: Path, length: int = 32) -> tuple[Checkpoint, Path]:
    """Palettize a model of `odd_models` and export it."""
    config = model.config.to_dict()
    parts = palettize_model(model.half(), recipe)
    made = Checkpoint(config=config, palettized=parts.palettized, dense=parts.dense, tied=parts.tied)
    plan = plan_export(made, interface="logits", sequence_length=length)
    export_packages(made, plan, folder, "model")
    package = load_package(folder / "model.mlpackage")
    # as promised before the work; the last blob is not padded to 64 bytes
    assert 0 <= plan.weights_size_bytes - package.weights_size_bytes < 64
    return made, package.path


# One conversion of each kind of architecture; the decoder itself is compared for every case in tests/models.
@pytest.mark.parametrize(
    "case", ["odd_sizes", "gqa_3_of_9_heads", "untied_and_biased", "one_head", "rope_yarn"]
)
def test_odd_model_comes_back_and_computes(case, tmp_path):
    assert case in CASES
    made, path = exported(build(case), uniform_recipe(4, 0), tmp_path)
    assert_same_bits(path, made.palettized)
    tokens = torch.randint(made.config["vocab_size"], (1, 32), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = load_hard_model(made)(tokens).logits
    found = load_package(path).run({"input_ids": tokens.int()})["logits"]
    # float32 arithmetic with RoPE tables that the package holds in float16: 2**-11 of each score. 5e-3 as measured.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("case", sampled(["plain", "untied_and_biased"], 2))
def test_package_of_an_outlier_model_is_finite(case, tmp_path):
    """Rounded to float16 after each op, the norm must not overflow where the square of an activation would."""
    made, path = exported(inject_outliers(build(case)), uniform_recipe(8, 0), tmp_path)
    hard = load_hard_model(made)
    residuals: list[Tensor] = []
    hard.model.norm.register_forward_pre_hook(lambda _module, args: residuals.append(args[0]))
    tokens = torch.randint(320, (1, 32), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = hard(tokens).logits
    assert residuals[0].half().square().isinf().any()  # the model does what it is for
    for precision in ("float32", "rounded", "float16"):
        found = load_package(path).run({"input_ids": tokens.int()}, precision=precision)["logits"].float()
        assert found.isfinite().all()
        # All 32 agree as measured, logits being off by 0.1 at most; nearly undecided ones may differ elsewhere.
        assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9


def test_dense_preset_exports(tmp_path):
    made, path = exported(build("plain"), PRESETS["dense"], tmp_path)
    dense = load_package(path).dense()
    assert load_package(path).palettized() == {}
    for name, tensor in made.dense.items():
        assert torch.equal(dense[name].flatten(), tensor.flatten()), name


@pytest.mark.parametrize("length", [0, 1, -1, 129])
def test_sequence_length_beyond_the_model(length):
    model = build("plain")
    made = Checkpoint(config=model.config.to_dict(), palettized={}, dense={})
    with pytest.raises(
        ConversionError, match=f"--sequence-length {length} is outside 2 to 128, the model's positions"
    ):
        plan_export(made, sequence_length=length, interface="logits")


def test_plan_refuses_a_target_before_the_work():
    model = build("plain")
    made = Checkpoint(config=model.config.to_dict(), palettized={WEIGHT: form(3)}, dense={})
    with pytest.raises(ConversionError, match="needs iOS18"):
        plan_export(made, target="iOS17", interface="logits")


def test_plan_refuses_rope_scaling_before_the_work():
    model = build("plain")
    config = {**model.config.to_dict(), "rope_parameters": {"rope_type": "ntk", "rope_theta": 1e4}}
    with pytest.raises(ConversionError, match="RoPE scaling 'ntk' is not supported"):
        plan_export(Checkpoint(config=config, palettized={}, dense={}), interface="logits")


def test_language_model_for_the_oldest_target(tmp_path):
    model = build("plain")
    config = model.config.to_dict()
    parts = palettize_model(model.half(), PRESETS["4bit-per-tensor"])
    made = Checkpoint(config=config, palettized=parts.palettized, dense=parts.dense, tied=parts.tied)
    plan = plan_export(made, interface="logits", target="iOS16", sequence_length=32)
    export_packages(made, plan, tmp_path, "model")
    assert_same_bits(tmp_path / "model.mlpackage", made.palettized)
    tokens = torch.randint(320, (1, 32), generator=torch.Generator().manual_seed(3))
    found = load_package(tmp_path / "model.mlpackage").run({"input_ids": tokens.int()})["logits"]
    with torch.no_grad():
        torch.testing.assert_close(found, load_hard_model(made)(tokens).logits, rtol=0, atol=2e-2)  # as above
