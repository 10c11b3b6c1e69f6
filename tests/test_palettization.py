from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch import Tensor, nn

from edkm_export import palettization
from edkm_export.artifact.metrics import divergence
from edkm_export.calibration import input_energy
from edkm_export.errors import InputError, PaletteError, RecipeError
from edkm_export.palette import PalettizedTensor
from edkm_export.palettization import PalettizedModel, palettizable_shapes, palettize_model, palettize_weight
from edkm_export.recipe import PRESETS, Recipe, Rule, uniform_recipe
from tests.helpers.odd_models import CASES, build, inject_outliers

# Sizes of the odd models that 16 does not divide, such as 27 and 37, need one LUT for the whole weight.
ODD_RECIPE = uniform_recipe(4, 0)


def grouped(tensor: PalettizedTensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """LUT entries float64 [groups, entries] and weights float64 [groups, weights of a group]."""
    groups = tensor.groups[0]
    return tensor.lut_values().double().view(groups, -1), weight.double().reshape(groups, -1)


def assert_nearest(tensor: PalettizedTensor, weight: Tensor) -> None:
    """No weight has an entry of its LUT that is nearer than the one it got."""
    entries, weights = grouped(tensor, weight)
    got = (weights - tensor.decode().double().reshape(weights.shape)).abs()
    nearest = (weights[..., None] - entries[:, None]).abs().amin(-1)
    assert torch.equal(got, nearest)


def decoded(model: nn.Module, parts: PalettizedModel) -> nn.Module:
    """The model with what the palettes decode to, float32."""
    state = {name: tensor.decode().float() for name, tensor in parts.palettized.items()}
    state |= {name: tensor.float() for name, tensor in parts.dense.items()}
    state |= {alias: state[name] for alias, name in parts.tied.items()}
    other = copy.deepcopy(model).float()
    other.load_state_dict(state)
    return other


# Models


@pytest.mark.parametrize("case", CASES)
def test_every_weight_of_an_odd_model(case):
    model = build(case).half()
    weights = {name: tensor.clone() for name, tensor in model.named_parameters()}
    linear = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))}
    done: list[tuple[str, int]] = []
    parts = palettize_model(model, ODD_RECIPE, advance=lambda name, count: done.append((name, count)))

    tied = model.config.tie_word_embeddings
    assert parts.tied == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    assert parts.palettized.keys() == {f"{name}.weight" for name in linear} - parts.tied.keys()
    assert parts.palettized.keys() | parts.dense.keys() == weights.keys()
    assert not parts.palettized.keys() & parts.dense.keys()
    assert sorted(done) == sorted(
        (name[: -len(".weight")], weights[name].numel()) for name in parts.palettized
    )
    for name, tensor in parts.palettized.items():
        outer = name.startswith(("model.embed_tokens", "lm_head"))
        assert tensor.name == name and tensor.shape == tuple(weights[name].shape)
        assert tensor.n_bits == (8 if outer else 4) and tensor.groups == (1, 1)
        assert_nearest(tensor, weights[name])
    for name, tensor in parts.dense.items():
        assert tensor.dtype == torch.float16 and torch.equal(tensor, weights[name])


def test_dense_parameters_are_copies():
    """The model is used up: nothing of the result may change with it, or keep it in memory."""
    model = build("attention_bias").half()
    parts = palettize_model(model, PRESETS["4bit"])
    norm = parts.dense["model.norm.weight"].clone()
    model.model.norm.weight.data.zero_()
    assert torch.equal(parts.dense["model.norm.weight"], norm)
    assert all(model.get_parameter(name).numel() == 0 for name in parts.palettized)  # freed one by one


def test_groups_of_rows_have_luts_of_their_own():
    model = build("gqa_4").half()
    weight = model.model.layers[0].mlp.up_proj.weight.data.clone()
    tensor = palettize_model(model, PRESETS["3bit"]).palettized["model.layers.0.mlp.up_proj.weight"]
    assert tensor.groups == (weight.shape[0] // 16, 1) and tensor.group_size == 16
    assert_nearest(tensor, weight)
    for group in range(tensor.groups[0]):
        rows = slice(16 * group, 16 * group + 16)
        alone = palettize_weight("w", weight[rows], Rule(bits=3, group_size=0))
        assert torch.equal(alone.lut[0], tensor.lut[group])


def test_dense_preset_keeps_every_parameter():
    model = build("untied_and_biased").half()
    weights = {name: tensor.clone() for name, tensor in model.named_parameters()}
    parts = palettize_model(model, PRESETS["dense"])
    assert parts.palettized == {} and parts.dense.keys() == weights.keys()
    assert all(torch.equal(parts.dense[name], tensor) for name, tensor in weights.items())


def test_dense_preset_keeps_ties():
    parts = palettize_model(build("plain").half(), PRESETS["dense"])
    assert parts.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "model.embed_tokens.weight" in parts.dense and "lm_head.weight" not in parts.dense


def test_recipe_decides_each_layer():
    recipe = Recipe(
        rules=(
            Rule(match="*.q_proj", bits=6, group_size=8),
            Rule(match="*.mlp.*", bits=2, lut_dtype="int8"),
            Rule(match="*", skip=True),
        )
    )
    parts = palettize_model(build("plain").half(), recipe)
    found = {
        name.split(".")[-2]: (tensor.n_bits, tensor.group_size, tensor.lut.dtype)
        for name, tensor in parts.palettized.items()
    }
    assert found == {
        "q_proj": (6, 8, torch.float16),
        "gate_proj": (2, 16, torch.int8),
        "up_proj": (2, 16, torch.int8),
        "down_proj": (2, 16, torch.int8),
    }
    assert "model.embed_tokens.weight" in parts.dense


def test_shapes_list_tied_weights_once():
    assert palettizable_shapes(build("plain"))["model.embed_tokens"] == (320, 32)
    assert "lm_head" not in palettizable_shapes(build("plain"))
    assert palettizable_shapes(build("untied"))["lm_head"] == (320, 32)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weight_that_is_not_finite_is_named(name, value):
    model = build("plain").half()
    model.get_parameter(name).data.view(-1)[5] = value
    with pytest.raises(
        InputError, match=re.escape(f"tiny: {name} holds NaN or infinity; the model is broken")
    ):
        palettize_model(model, PRESETS["4bit"], source="tiny")


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        (
            uniform_recipe(4, 5),
            PaletteError,
            "group_size 5 does not divide its 32 output rows; use 4, 8, 16 or 32",
        ),
        (Recipe(rules=(Rule(match="transformer.*"),)), RecipeError, "no module matches 'transformer.*'"),
    ],
)
def test_recipe_that_does_not_fit_is_refused_before_the_work(recipe, error, message):
    model = build("plain").half()
    with pytest.raises(error, match=re.escape(message)):
        palettize_model(model, recipe, source="tiny")
    assert all(parameter.numel() for parameter in model.parameters())


# Weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_luts_are_on_the_float16_grid_and_weights_at_the_nearest_entry(bits, dtype):
    weight = torch.randn(32, 40, generator=torch.Generator().manual_seed(bits)).to(dtype)
    tensor = palettize_weight("w", weight, Rule(bits=bits, group_size=8))
    assert tensor.lut.dtype == torch.float16 and tensor.n_bits == bits and tensor.groups == (4, 1)
    assert_nearest(tensor, weight)


def test_one_weight_for_each_entry_is_lossless():
    """16 distinct values fit a LUT of 16; float16 holds them exactly."""
    values = torch.arange(-8, 8).half() / 4
    weight = values[torch.randint(16, (8, 50), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(palettize_weight("w", weight, Rule(bits=4, group_size=0)).decode(), weight)


@pytest.mark.parametrize("weight", [torch.zeros(4, 6), torch.full((4, 6), -2.5), torch.tensor([[1e-7]])])
@pytest.mark.parametrize("lut_dtype", ["float16", "int8"])
def test_constant_weights(weight, lut_dtype):
    tensor = palettize_weight("w", weight.half(), Rule(bits=4, group_size=0, lut_dtype=lut_dtype))
    # float16 LUTs hold the value itself; on an int8 grid it is off by half a step, of which there are at least 112 up
    # to the largest (127 with a scale that fits, which has four bits), and by half the smallest float16, 3e-8
    torch.testing.assert_close(
        tensor.decode(), weight.half(), rtol=0 if lut_dtype == "float16" else 0.5 / 112, atol=1e-7
    )


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize(
    "weight",
    [torch.zeros(4, 6), torch.full((4, 6), -2.5), torch.tensor([[1e-7]]), torch.tensor([[0.5, 0.5, -1.0]])],
)
def test_few_values_on_an_int4_grid(weight, bits):
    tensor = palettize_weight("w", weight.half(), Rule(bits=bits, group_size=0, lut_dtype="int4"))
    # scales are 1/15 to 1/8 apart, and a value may be any of 7 multiples
    torch.testing.assert_close(tensor.decode(), weight.half(), rtol=1 / 16, atol=1e-7)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_int4_luts(bits):
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(32, 40, generator=generator) * torch.logspace(-2, 1, 32)[:, None]).half()
    tensor = palettize_weight("w", weight, Rule(bits=bits, group_size=8, lut_dtype="int4"))
    assert tensor.lut.dtype == torch.int8 and tensor.lut_scale is not None
    assert int(tensor.lut.min()) >= -8 and int(tensor.lut.max()) <= 7
    product = tensor.lut.double() * tensor.lut_scale.double()[:, :, None, None]
    assert torch.equal(tensor.lut_values().double(), product)
    assert torch.equal(tensor.decode().bfloat16().float(), tensor.decode().float())
    assert_nearest(tensor, weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_int8_luts(bits):
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(32, 40, generator=generator) * torch.logspace(-2, 1, 32)[:, None]).half()
    tensor = palettize_weight("w", weight, Rule(bits=bits, group_size=8, lut_dtype="int8"))
    assert tensor.lut.dtype == torch.int8 and tensor.lut_scale is not None
    # each scale is as fine as its group allows with four significant bits: at most 9/8 of what would reach 127
    assert all(112 <= largest <= 127 for largest in tensor.lut.abs().amax((1, 2, 3)).tolist())
    assert int(tensor.lut.min()) >= -127
    product = tensor.lut.double() * tensor.lut_scale.double()[:, :, None, None]
    assert torch.equal(tensor.lut_values().double(), product)  # float16 holds it without rounding
    assert_nearest(tensor, weight)
    # Entries move by at most half a step of the int8 grid, and so does the error of a weight.
    floats = palettize_weight("w", weight, Rule(bits=bits, group_size=8))
    float_error = (floats.decode() - weight).abs().view(4, -1).amax(1)
    int8_error = (tensor.decode() - weight).abs().view(4, -1).amax(1)
    assert bool((int8_error <= float_error + 0.51 * tensor.lut_scale[:, 0]).all())


@pytest.mark.parametrize("lut_dtype", ["int8", "int4"])
def test_blocks_of_groups_do_not_matter(lut_dtype, monkeypatch):
    weight = torch.randn(48, 20, generator=torch.Generator().manual_seed(0)).half()
    importance = torch.rand(20, generator=torch.Generator().manual_seed(1))
    rule = Rule(bits=3, group_size=4, lut_dtype=lut_dtype)
    whole = palettize_weight("w", weight, rule, importance=importance)
    for size in (1, 170, 500):
        monkeypatch.setattr(palettization, "_BLOCK_WEIGHTS", size)
        assert palettize_weight("w", weight, rule, importance=importance).same_bits(whole)


def test_importance_belongs_to_the_columns():
    """A column that matters a million times more is met almost exactly, in every group."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 64, generator=generator).half()
    importance = torch.ones(64)
    importance[7] = 1e6
    plain = palettize_weight("w", weight, Rule(bits=2, group_size=2)).decode() - weight
    weighted = (
        palettize_weight("w", weight, Rule(bits=2, group_size=2), importance=importance).decode() - weight
    )
    # two weights of column 7 a group and four entries: each can have an entry of its own, rounded to float16
    assert weighted[:, 7].abs().max() < 2e-3 < plain[:, 7].abs().mean()
    assert weighted.square().sum() > plain.square().sum()  # which the other columns pay for


# Calibration


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("case", ["gqa_4", "untied"])
def test_calibration_lowers_the_output_error(case, bits, seed):
    """Judged on other tokens than those it was calibrated on."""
    model = inject_outliers(build(case, seed), seed=seed).half()
    original = copy.deepcopy(model).float()
    generator = torch.Generator().manual_seed(seed)
    energy = input_energy(model, torch.randint(320, (8, 48), generator=generator))
    tokens = torch.randint(320, (4, 48), generator=generator)

    inputs: dict[str, Tensor] = {}
    readers = ("q_proj", "k_proj", "v_proj")  # of the first layer: they read the channel with outliers
    for reader in readers:
        module = original.get_submodule(f"model.layers.0.self_attn.{reader}")
        module.register_forward_pre_hook(
            lambda _module, args, reader=reader: inputs.update({reader: args[0]})
        )
    with torch.no_grad():
        expected = original(tokens).logits.flatten(0, 1)

    def measure(energy: dict[str, Tensor] | None) -> tuple[dict[str, float], float]:
        """Relative squared error of each reader's output, and mean KL divergence of the model."""
        parts = palettize_model(copy.deepcopy(model), uniform_recipe(bits), energy=energy)
        errors = {}
        for reader in readers:
            name = f"model.layers.0.self_attn.{reader}.weight"
            weight = original.get_parameter(name).detach().double()
            x = inputs[reader].flatten(0, 1).double()
            off = x @ (weight - parts.palettized[name].decode().double()).t()
            errors[reader] = float(off.square().sum() / (x @ weight.t()).square().sum())
        with torch.no_grad():
            logits = decoded(original, parts)(tokens).logits.flatten(0, 1)
        return errors, divergence([(expected, logits)]).kl_mean

    plain, weighted = measure(None), measure(energy)
    # Measured 75 to 830 times lower over the twelve; 20 leaves room for another order of sums.
    assert sum(weighted[0].values()) < sum(plain[0].values()) / 20
    # Measured 1.95 to 12 times lower.
    assert weighted[1] < plain[1] / 1.5


def test_energy_of_the_head_weighs_a_tied_embedding():
    model = build("plain").half()
    weight = model.model.embed_tokens.weight.data.clone()
    energy = torch.ones(32)
    energy[5] = 1e6
    recipe = Recipe(rules=(Rule(match="*embed_tokens", bits=2, group_size=0), Rule(match="*", skip=True)))
    plain = palettize_model(copy.deepcopy(model), recipe).palettized["model.embed_tokens.weight"]
    weighted = palettize_model(model, recipe, energy={"lm_head": energy}).palettized[
        "model.embed_tokens.weight"
    ]
    error = [float((tensor.decode() - weight)[:, 5].square().sum()) for tensor in (plain, weighted)]
    assert error[1] < error[0]


def test_energy_of_other_layers_is_not_needed():
    model = build("plain").half()
    name = "model.layers.0.mlp.up_proj"
    only = palettize_model(copy.deepcopy(model), PRESETS["2bit"], energy={name: torch.linspace(0.01, 1, 32)})
    plain = palettize_model(model, PRESETS["2bit"])
    different = [
        key for key, tensor in plain.palettized.items() if not tensor.same_bits(only.palettized[key])
    ]
    assert different == [f"{name}.weight"]
