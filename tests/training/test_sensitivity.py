"""Fisher estimates, mixed bits, and scales that are folded."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from edkm_export.errors import InputError
from edkm_export.recipe import Recipe, Rule, uniform_recipe
from edkm_export.training.palettized.clusters import ClusterMethod
from edkm_export.training.palettized.surgery import (
    Importance,
    insert_clusters,
    to_checkpoint,
    trainable_shapes,
)
from edkm_export.training.scaling import fold_scales, norm_readers
from edkm_export.training.sensitivity import (
    Sensitivity,
    allocate_bits,
    fisher_factors,
    mixed_recipe,
    wider_rules,
)
from edkm_export.weight_storage import average_bits
from tests.helpers.odd_models import build


def test_factors_are_mean_squares_of_inputs_and_output_gradients() -> None:
    """One window: the gradient of a layer's bias-like shift, by autograd, is the sum of its output gradients."""
    model = build("untied_and_biased").requires_grad_(False)
    windows = torch.randint(256, (1, 8), generator=torch.Generator().manual_seed(0))
    found = fisher_factors(model, windows, seed=5)
    name = "model.layers.1.mlp.down_proj"
    module = model.get_submodule(name)
    inputs, outputs = [], []

    def keep(_module: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        inputs.append(args[0])
        outputs.append(output)

    hook = module.register_forward_hook(keep)
    model.get_input_embeddings().weight.requires_grad_(True)
    logits = model(input_ids=windows, use_cache=False).logits[0]
    hook.remove()
    labels = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(5))[:, 0]
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, outputs)
    torch.testing.assert_close(found[name].inputs, inputs[0][0].square().mean(0), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found[name].outputs, gradient[0].square().mean(0), rtol=1e-4, atol=1e-8)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_factors_of_a_vocabulary_are_of_both_uses(tied: bool) -> None:
    """Lookups against autograd with what is looked up as a leaf; the head's inputs from the last norm."""
    model = build("plain" if tied else "untied").requires_grad_(False)
    windows = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(0))
    found = fisher_factors(model, windows, seed=5, vocabulary=True)
    looked_up = model.get_input_embeddings()(windows).requires_grad_()
    hidden = model.model(inputs_embeds=looked_up, use_cache=False).last_hidden_state[0]
    logits = model.lm_head(hidden)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(5))[:, 0]
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    gradient = looked_up.grad[0]
    embedding = found["model.embed_tokens"]
    near = {"rtol": 1e-4, "atol": 1e-9}
    torch.testing.assert_close(embedding.inputs, gradient.square().mean(0), **near)
    torch.testing.assert_close(embedding.products, gradient.T @ gradient / 12, **near)
    counts = torch.bincount(windows[0], minlength=320) / 12
    torch.testing.assert_close(embedding.outputs, (counts + counts.mean()) / 2, **near)
    head = embedding.further if tied else found["lm_head"]
    torch.testing.assert_close(head.products, (hidden.T @ hidden / 12).detach(), **near)
    share = (logits.softmax(-1) - torch.nn.functional.one_hot(labels, 320)).square().mean(0).detach()
    torch.testing.assert_close(head.outputs, (share + share.mean()) / 2, **near)
    assert (found["lm_head"] is embedding) == tied and (embedding.further is None) == (not tied)
    # what an error of one weight costs, from both products
    wanted = torch.outer(embedding.outputs, embedding.inputs)
    wanted = wanted + torch.outer(head.outputs, head.inputs) if tied else wanted
    torch.testing.assert_close(embedding.of_weights(320, 32), wanted)
    cost = embedding.products * embedding.outputs.mean()
    cost = cost + head.products * head.outputs.mean() if tied else cost
    torch.testing.assert_close(embedding.row_cost(), cost)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_of_16_bit_models_are_those_of_the_same_numbers_in_float32(dtype: torch.dtype) -> None:
    narrow = build("untied_and_biased").to(dtype).requires_grad_(False)
    wide = build("untied_and_biased").to(dtype).float().requires_grad_(False)
    windows = torch.randint(256, (2, 8), generator=torch.Generator().manual_seed(0))
    before = {name: tensor.clone() for name, tensor in narrow.state_dict().items()}
    found, expected = (fisher_factors(model, windows, vocabulary=True) for model in (narrow, wide))
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name].inputs, expected[name].inputs, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(found[name].outputs, expected[name].outputs, rtol=1e-4, atol=1e-9)
    after = narrow.state_dict()  # nothing is left wide, no layer keeps a forward of ours
    assert all(tensor.dtype == dtype and torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert not any("forward" in vars(module) for module in narrow.modules())


def test_rows_that_lie_evenly_stand_for_a_layer() -> None:
    """Rows of like kind: the estimate from a quarter of them is near that of all, also where some rows count more."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 64, generator=generator)
    outputs = torch.rand(512, generator=generator) ** 8
    importance = {"layer": Importance(torch.rand(64, generator=generator) + 0.1, outputs)}
    for group_size in (16, 0):
        choices = {"layer": {bits: Rule(bits=bits, group_size=group_size) for bits in (2, 4)}}
        whole, part = (
            Sensitivity({"layer": weight}, choices, importance, sampled=sampled) for sampled in (None, 8192)
        )
        for bits in (2, 4):
            assert part.loss("layer", bits) == pytest.approx(whole.loss("layer", bits), rel=0.1)
            assert part.loss("layer", bits) != whole.loss("layer", bits)
        assert part.tried == 2 and not part.seeds and len(whole.seeds) == 2


def random_choices(
    generator: torch.Generator,
) -> tuple[dict[str, dict[int, int]], dict[tuple[str, int], float]]:
    """Five layers of three sizes: storage, and losses that fall about fourfold with each bit."""
    losses = torch.rand(5, generator=generator) + 0.01
    falls = 3 + 2 * torch.rand(5, 3, generator=generator)
    sizes = {str(n): {bits: (n + 1) * 100 * bits for bits in (2, 3, 4)} for n in range(5)}
    return sizes, {
        (name, bits): float(losses[n] * falls[n, bits - 2] ** (2 - bits))
        for n, (name, choices) in enumerate(sizes.items())
        for bits in choices
    }


def greedy(
    sizes: dict[str, dict[int, int]], losses: dict[tuple[str, int], float], budget: int
) -> dict[str, int]:
    """The same choice from all losses, without bounds."""
    chosen = dict.fromkeys(sizes, 2)
    while True:
        used = sum(sizes[name][bits] for name, bits in chosen.items())
        gains = {
            (name, bits): (losses[name, chosen[name]] - losses[name, bits])
            / (size - sizes[name][chosen[name]])
            for name, choices in sizes.items()
            for bits, size in choices.items()
            if bits > chosen[name] and used + size - sizes[name][chosen[name]] <= budget
        }
        if not gains:
            return chosen
        name, bits = max(gains, key=gains.__getitem__)
        chosen[name] = bits


def test_greedy_bits_are_within_one_layers_step_of_the_optimum() -> None:
    generator = torch.Generator().manual_seed(0)
    for trial in range(20):
        sizes, losses = random_choices(generator)
        budget = 1500 * 2 + 150 * (trial + 1) // 2
        chosen = allocate_bits(sizes, lambda *key, losses=losses: losses[key], budget)
        assert chosen == greedy(sizes, losses, budget)
        assert sum(sizes[name][bits] for name, bits in chosen.items()) <= budget
        best = min(
            sum(losses[str(n), bits] for n, bits in enumerate(each))
            for each in itertools.product((2, 3, 4), repeat=5)
            if sum(sizes[str(n)][bits] for n, bits in enumerate(each)) <= budget
        )
        largest = max(losses[name, 2] for name in sizes)
        assert sum(losses[name, bits] for name, bits in chosen.items()) <= best + largest
    with pytest.raises(InputError, match="100 bits are not enough: the smallest choice takes 3000"):
        allocate_bits(sizes, lambda *key: losses[key], 100)


def test_losses_that_cannot_win_are_not_asked_for() -> None:
    """One loud layer, and room for one step: the others are known at their smallest size only."""
    sizes = {str(n): {bits: 100 * bits for bits in (2, 3, 4)} for n in range(10)}
    asked = set()

    def loss(name: str, bits: int) -> float:
        asked.add((name, bits))
        return (100.0 if name == "7" else 1.0) * 4.0 ** (2 - bits)

    assert allocate_bits(sizes, loss, 2100) == dict.fromkeys(sizes, 2) | {"7": 3}
    assert asked == {(name, 2) for name in sizes} | {("7", 3)}


@pytest.mark.parametrize("lut_dtype", ["float16", "int8", "int4"])
def test_mixed_bits_average_what_was_asked_and_what_is_stored(lut_dtype: Any) -> None:
    model = build("plain").requires_grad_(False)
    windows = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
    base = uniform_recipe(2, 4, lut_dtype)
    shapes = trainable_shapes(model)
    plan = {name: rule for name, rule in base.plan(shapes, "m").items() if "embed" not in name}
    choices = {name: wider_rules(rule) for name, rule in plan.items()}
    found = Sensitivity(
        {name: model.get_submodule(name).weight for name in plan}, choices, fisher_factors(model, windows)
    )
    for name, sizes in found.sizes.items():
        losses = [found.loss(name, bits) for bits in sorted(sizes)]
        assert losses == sorted(losses, reverse=True) and losses[0] > 0
    numel = sum(model.get_submodule(name).weight.numel() for name in plan)
    chosen = allocate_bits(found.sizes, found.loss, int(3.9 * numel))
    recipe = mixed_recipe(base, {name: choices[name][bits] for name, bits in chosen.items()}, plan)
    mixed = {name: recipe.rule_for(name) for name in plan}
    assert {rule.bits for rule in mixed.values()} >= {2, 3}
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe  # as a run that goes on reads it
    if lut_dtype == "int4":
        assert {(rule.bits <= 3, rule.lut_dtype) for rule in mixed.values()} == {
            (True, "int4"),
            (False, "int8"),
        }
    insert_clusters(model, recipe, method=ClusterMethod(), seeds=found.seeds)
    stored = [t for n, t in to_checkpoint(model, recipe).palettized.items() if "embed" not in n]
    actual = sum(tensor.size_bytes for tensor in stored) * 8 / numel
    assert average_bits(shapes, mixed) == pytest.approx(actual, abs=1e-9)
    assert 3.5 < actual <= 3.9


def loud_model() -> Any:
    """One channel of a norm is 30 times as loud as the others."""
    model = build("untied").requires_grad_(False)
    model.model.layers[0].input_layernorm.weight[3] *= 30
    return model


def test_folding_keeps_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edkm_export.training.scaling._EXPONENTS", (0.5,))  # scales whether it helps or not
    windows = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(0))
    model = loud_model()
    logits = model(input_ids=windows).logits
    shapes = trainable_shapes(model)
    plan = {name: rule for name, rule in uniform_recipe(3, 0).plan(shapes, "m").items() if "proj" in name}
    name = "model.layers.0.self_attn.q_proj"
    before = model.get_submodule(name).weight.clone()
    folded = fold_scales(model, windows[0], plan, fisher_factors(model, windows))
    torch.testing.assert_close(model(input_ids=windows).logits, logits, rtol=1e-5, atol=1e-5)
    grown = model.get_submodule(name).weight / before
    assert (grown == grown[:1]).all() and grown[0, 3] == grown[0].max() >= 2  # powers of two, exact
    again = fisher_factors(model, windows)[name]
    torch.testing.assert_close(folded[name].inputs, again.inputs, rtol=1e-3, atol=1e-6)


def test_folding_never_raises_the_estimate() -> None:
    windows = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(0))
    model = loud_model()
    shapes = trainable_shapes(model)
    plan = {name: rule for name, rule in uniform_recipe(3, 4).plan(shapes, "m").items() if "proj" in name}

    def estimate(importance: dict[str, Importance]) -> float:
        choices = {name: wider_rules(rule) for name, rule in plan.items()}
        found = Sensitivity({name: model.get_submodule(name).weight for name in plan}, choices, importance)
        return sum(found.loss(name, 3) for name in found.sizes)

    importance = fisher_factors(model, windows)
    before = estimate(importance)
    after = estimate(fold_scales(model, windows[0], plan, importance))
    assert after <= before * 1.0001


def test_readers_of_a_norm() -> None:
    model = build("one_layer")
    found = norm_readers(model, torch.randint(256, (8,)))
    layer = "model.layers.0"
    assert found == {
        f"{layer}.input_layernorm": [f"{layer}.self_attn.{name}_proj" for name in "qkv"],
        f"{layer}.post_attention_layernorm": [f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"],
    }


def test_a_norm_of_another_form_is_left_alone() -> None:
    """Gemma multiplies by (1 + weight): dividing the weight changes the function, which the check undoes."""
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(0)
    config = GemmaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=8)  # fmt: skip
    model = GemmaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.normal_()
    windows = torch.randint(64, (2, 16))
    before = model(input_ids=windows).logits
    plan = {n: r for n, r in uniform_recipe(2, 0).plan(trainable_shapes(model), "m").items() if "proj" in n}
    fold_scales(model, windows[0], plan, fisher_factors(model, windows))
    torch.testing.assert_close(model(input_ids=windows).logits, before, rtol=1e-4, atol=1e-4)
