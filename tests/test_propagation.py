from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edkm_export.artifact.metrics import divergence
from edkm_export.calibration import input_energy
from edkm_export.compensated_weight import palettize_compensated
from edkm_export.errors import InputError
from edkm_export.palettization import PalettizedModel, palettize_model
from edkm_export.propagation import Propagation, windows_at_once
from edkm_export.recipe import PRESETS, Recipe, Rule, uniform_recipe
from tests.helpers.odd_models import build, inject_outliers


def windows_of(count: int = 6, context: int = 32, seed: int = 0, vocabulary: int = 320) -> Tensor:
    return torch.randint(vocabulary, (count, context), generator=torch.Generator().manual_seed(seed))


def decoded(model: nn.Module, parts: PalettizedModel) -> Any:
    """The float32 model with what the palettes decode to."""
    state = {name: tensor.decode().float() for name, tensor in parts.palettized.items()}
    state |= {name: tensor.float() for name, tensor in parts.dense.items()}
    state |= {alias: state[name] for alias, name in parts.tied.items()}
    other = copy.deepcopy(model).float()
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("case", ["gqa_4", "untied_and_biased", "odd_sizes"])
def test_each_layer_is_palettized_on_what_those_before_it_make(case):
    """Layer by layer, transformers' own model runs with the weights so far, and a hook takes what a layer is given."""
    model = inject_outliers(build(case)) if case == "gqa_4" else build(case)
    recipe = uniform_recipe(3, 0)
    windows = windows_of()
    done: list[str] = []
    parts = palettize_model(
        copy.deepcopy(model), recipe, windows=windows, advance=lambda name, _count: done.append(name)
    )
    order = [name for name in done if "layers" in name]
    assert len(order) == 7 * model.config.num_hidden_layers
    assert parts.compensated == {f"{name}.weight" for name in order}
    twin = copy.deepcopy(model)
    for name in order:
        given: list[Tensor] = []
        layer = twin.get_submodule(name)
        hook = layer.register_forward_pre_hook(lambda _layer, args, given=given: given.append(args[0]))
        with torch.no_grad():
            twin(windows)
        hook.remove()
        inputs = given[0].flatten(0, 1)
        hessian = inputs.t() @ inputs / len(inputs)
        expected = palettize_compensated(
            f"{name}.weight", layer.weight.data, Rule(bits=3, group_size=0), hessian, samples=len(inputs)
        )
        found = parts.palettized[f"{name}.weight"]
        assert found.same_bits(expected), name
        layer.weight.data = found.decode().float()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_model_with_outliers_is_nearer_to_the_original(bits):
    """Judged on other tokens than those it was calibrated on."""
    model = inject_outliers(build("gqa_4")).half()
    original = copy.deepcopy(model).float()
    windows, tokens = windows_of(24, 48), windows_of(4, 48, seed=1)
    weighed = palettize_model(copy.deepcopy(model), uniform_recipe(bits), energy=input_energy(model, windows))
    made = palettize_model(model, uniform_recipe(bits), windows=windows)
    with torch.no_grad():
        expected = original(tokens).logits.flatten(0, 1)
        kl = [
            divergence([(expected, decoded(original, parts)(tokens).logits.flatten(0, 1))]).kl_mean
            for parts in (made, weighed)
        ]
    assert kl[0] < 0.9 * kl[1]


def test_a_model_that_is_not_consumed_is_left_as_it_is():
    model = build("untied_and_biased").half()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = palettize_model(model, PRESETS["3bit"], windows=windows_of(), consume=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any("forward" in module.__dict__ or module._forward_hooks for module in model.modules())
    used = palettize_model(model, PRESETS["3bit"], windows=windows_of())
    assert kept.palettized.keys() == used.palettized.keys()
    assert list(kept.palettized) == [name for name, _ in model.named_parameters() if name in kept.palettized]
    assert all(tensor.same_bits(used.palettized[name]) for name, tensor in kept.palettized.items())
    assert all(model.get_parameter(name).numel() == 0 for name in used.palettized)


def test_layers_without_a_rule_and_of_many_bits():
    """What stays dense is as it was, 8 bits are weighted k-means; the head's inputs weigh the tied embedding."""
    model = build("plain").half()
    recipe = Recipe(
        rules=(
            Rule(match="*.q_proj", skip=True),
            Rule(match="*.k_proj", bits=8, group_size=0),
            Rule(match="*embed_tokens", bits=2, group_size=0),
            Rule(match="*", bits=3, group_size=0),
        )
    )
    parts = palettize_model(copy.deepcopy(model), recipe, windows=windows_of())
    assert "model.layers.0.self_attn.q_proj.weight" in parts.dense
    wide = {name for name in parts.palettized if "k_proj" in name or "embed" in name}
    assert parts.compensated == parts.palettized.keys() - wide
    name = "model.layers.0.self_attn.k_proj"
    energy = input_energy(model, windows_of())
    alone = palettize_model(
        model, recipe, energy=energy
    )  # the first layer is given what the float model gives it
    torch.testing.assert_close(
        parts.palettized[f"{name}.weight"].decode(),
        alone.palettized[f"{name}.weight"].decode(),
        rtol=1e-3,  # one float16: the energies are sums in another order
        atol=0,
    )


def test_gpt2():
    """Conv1D holds its weight turned."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()
    original = copy.deepcopy(model)
    parts = palettize_model(model, uniform_recipe(3, 16), windows=windows_of())
    assert len(parts.compensated) == 8
    weight = original.transformer.h[0].mlp.c_fc.weight.data.t()
    made = parts.palettized["transformer.h.0.mlp.c_fc.weight"]
    assert made.shape == tuple(weight.shape)
    assert float((made.decode() - weight).square().mean()) < 0.2 * float(weight.square().mean())


@pytest.mark.parametrize(
    "where", ["model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"]
)
def test_a_broken_model_is_refused_and_left_as_it_is(where):
    model = build("plain")
    model.get_parameter(where).data.view(-1)[3] = float("nan")
    message = (
        "up_proj.weight holds NaN"
        if "up_proj" in where
        else "its input is not finite on the calibration text"
    )
    with pytest.raises(InputError, match=message):
        palettize_model(model, PRESETS["4bit"], windows=windows_of(), consume=False)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_token_beyond_the_vocabulary():
    with pytest.raises(InputError, match="token 320 is beyond the model's vocabulary of 320"):
        Propagation(build("plain"), {}).run(torch.tensor([[3, 320]]))


def test_windows_at_once_bounds_the_values_of_the_widest_layer():
    model = build("plain")  # 48 wide
    many = torch.zeros(4, 1, dtype=torch.int64).expand(4, 1 << 18)
    assert len(windows_at_once(model, many)) == (1 << 25) // (48 << 18)
    assert len(windows_at_once(model, many[:, :10])) == 4
    wide = torch.zeros(2, 1, dtype=torch.int64).expand(2, 1 << 24)
    assert len(windows_at_once(model, wide)) == 1
