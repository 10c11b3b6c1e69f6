"""GPT-2's Conv1D: [in, out] in transformers, [out, in] in checkpoints, decoders and artifacts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edkm_export.calibration import input_energy
from edkm_export.checkpoint import Checkpoint
from edkm_export.decoder.build import build_decoder
from edkm_export.decoder.whole_sequence import WholeSequence
from edkm_export.palettization import palettizable_shapes, palettize_model
from edkm_export.recipe import PRESETS, Recipe, Rule, uniform_recipe
from edkm_export.reference.hard_model import load_hard_model
from edkm_export.reference.source import Source, load_model
from edkm_export.training.palettized.clusters import ClusterMethod
from edkm_export.training.palettized.surgery import insert_clusters, to_checkpoint, trainable_shapes
from tests.helpers.odd_families import build

SQUARE = "transformer.h.1.attn.c_proj"  # [32, 32]: its shape does not tell which way round it is
MIXED = Recipe(
    rules=(
        Rule(match="*wpe", skip=True),
        Rule(match="*.attn.c_proj", skip=True),
        Rule(match="*.1.mlp.*", skip=True),
        Rule(bits=8, group_size=1),
    )
)


def one_shot(model: Any, recipe: Recipe) -> Checkpoint:
    config = model.config.to_dict()
    parts = palettize_model(model, recipe)
    return Checkpoint(config=config, palettized=parts.palettized, dense=parts.dense, tied=parts.tied)


def trained(model: Any, recipe: Recipe) -> Checkpoint:
    return to_checkpoint(insert_clusters(model, recipe, method=ClusterMethod()), recipe)


@pytest.fixture(params=[one_shot, trained])
def made(request) -> Checkpoint:
    """Some weights palettized and some dense."""
    return request.param(build("gpt2").half().float(), MIXED)


def tokens() -> Tensor:
    return torch.randint(3, 96, (1, 20), generator=torch.Generator().manual_seed(1))


def test_both_ways_agree_on_names_and_shapes():
    model = build("gpt2")
    shapes = palettizable_shapes(model)
    assert shapes == trainable_shapes(model)
    assert shapes["transformer.h.0.attn.c_attn"] == (96, 32)
    assert shapes["transformer.h.0.mlp.c_fc"] == (128, 32)


def test_dense_and_palettized_weights_are_turned(made):
    model = build("gpt2").half()
    state = model.state_dict()
    assert torch.equal(made.dense[f"{SQUARE}.weight"].half(), state[f"{SQUARE}.weight"].t())
    decoded = made.palettized["transformer.h.0.attn.c_attn.weight"].decode()
    # 256 entries for 32 weights of a row: the k-means is exact
    torch.testing.assert_close(decoded, state["transformer.h.0.attn.c_attn.weight"].t(), rtol=1e-3, atol=0)
    assert made.tied == {"lm_head.weight": "transformer.wte.weight"}
    assert "transformer.wpe.weight" in made.dense


@torch.no_grad()
def test_hard_model_and_decoder_turn_them_back(made):
    before = build("gpt2").half().float()(tokens()).logits
    hard = load_hard_model(made)(tokens()).logits
    torch.testing.assert_close(hard, before, rtol=0, atol=2e-2)  # only float16 rounding of the tables is left
    found = WholeSequence(build_decoder(made), made.config, 20)(tokens())
    torch.testing.assert_close(found, hard, rtol=0, atol=1e-4)  # float32 on both sides


@pytest.mark.parametrize("name", ["4bit", "3bit", "4bit-per-tensor"])
def test_presets_know_the_names(name):
    plan = PRESETS[name].plan(palettizable_shapes(build("gpt2")), "model")
    assert (plan["transformer.wte"].bits, plan["transformer.wte"].group_size) == (8, 0)
    assert "transformer.wpe" not in plan
    assert {rule.bits for layer, rule in plan.items() if ".h." in layer} == {int(name[0])}
    assert len(plan) == 1 + 2 * 4


def test_calibration_sees_every_layer_and_helps():
    windows = torch.randint(3, 96, (2, 32), generator=torch.Generator().manual_seed(1))
    model = build("gpt2")
    with torch.no_grad():
        model.transformer.h[0].ln_2.weight[:4] *= 20  # a few channels that matter
    energy = input_energy(model, windows)
    assert energy["transformer.h.0.mlp.c_fc"].shape == (32,)
    assert energy["transformer.h.0.mlp.c_proj"].shape == (128,)
    assert set(energy) == {name for name in palettizable_shapes(model) if ".h." in name} | {"lm_head"}
    name = "transformer.h.0.mlp.c_fc"
    weight, errors = model.get_submodule(name).weight.detach().t().clone(), []
    for known in (energy, None):
        twin = build("gpt2")
        twin.load_state_dict(model.state_dict())
        decoded = (
            palettize_model(twin, uniform_recipe(3, 16), energy=known).palettized[f"{name}.weight"].decode()
        )
        errors.append(float(((decoded.float() - weight).square() * energy[name]).sum()))
    assert (
        errors[0] < 0.8 * errors[1]
    )  # the exact optimum of this error; the other one does not know the channels


def test_scaled_embedding_of_gemma_stays_tied_in_training():
    model = build("gemma3")
    before = model(tokens()).logits
    recipe = uniform_recipe(8, 1)
    insert_clusters(model, recipe, method=ClusterMethod())
    made = to_checkpoint(model, recipe)
    assert made.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    with torch.no_grad():
        # 256 entries for each row, 256 for the embedding: its rounding is left
        torch.testing.assert_close(model(tokens()).logits, before, rtol=0, atol=0.1)
        torch.testing.assert_close(
            load_hard_model(made)(tokens()).logits, model(tokens()).logits, rtol=0, atol=1e-4
        )


def test_files_of_older_versions_are_read(tmp_path):
    """Names without the prefix, and the causal mask saved as if it were a weight."""
    model = build("gpt2")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    weights["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = load_model(Source.parse(str(tmp_path)), torch.float32).state_dict()
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
