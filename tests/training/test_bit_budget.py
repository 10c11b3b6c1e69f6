"""Bits over all weights: what is predicted is what is written, what cannot be had is refused, what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import edkm_export
from edkm_export.checkpoint import Checkpoint, load
from edkm_export.errors import InputError
from edkm_export.palettization import palettizable_shapes
from edkm_export.recipe import PRESETS, Recipe, Rule, uniform_recipe
from edkm_export.training.bit_budget import BitBudget, BitTarget
from edkm_export.training.first_centroids import Seeding
from edkm_export.training.optimizer import freeze
from edkm_export.training.palettized.clusters import ClusterMethod
from edkm_export.training.palettized.surgery import clusters_of, insert_clusters
from edkm_export.training.preparation import check_target
from edkm_export.training.run_record import RunRecord
from edkm_export.training.sensitivity import fisher_factors
from edkm_export.training.train_config import TrainConfig
from tests.helpers.odd_models import build
from tests.helpers.paths import FIXTURES
from tests.helpers.sampling import sampled

DATA = FIXTURES / "calibration.txt"
EMBEDDING = "model.embed_tokens.weight"


def windows(seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (8, 32), generator=torch.Generator().manual_seed(seed))


def written_bits(made: Checkpoint) -> int:
    """Storage counted from the tensors themselves; what stays dense as float16."""
    found = sum(tensor.numel() * 16 for tensor in made.dense.values())
    for tensor in made.palettized.values():
        parts = [tensor.indices, tensor.lut] + ([] if tensor.lut_scale is None else [tensor.lut_scale])
        found += sum(part.numel() * part.element_size() * 8 for part in parts)
    return found


CASES = [
    ("plain", 4.5, {}),
    ("untied", 4.2, {}),
    ("untied_and_biased", 3.9, {"bits": 2, "group_size": 0}),
    ("vocab_257", 5.5, {}),  # prime: a LUT for each row would take more than 8 bits
    ("odd_sizes", 5.0, {"lut_dtype": "int8"}),
    ("head_dim_10", 4.0, {"bits": 2, "lut_dtype": "int4", "group_size": 8}),
]


@pytest.mark.parametrize(("case", "target", "options"), sampled(CASES, 2, several=True))
def test_what_is_predicted_is_what_is_written(case: str, target: float, options: dict[str, Any]) -> None:
    made = edkm_export.palettize(build(case), calibration=windows(), target_bits=target, **options)
    told = made.provenance["target_bits"]
    assert told["predicted_bytes"] * 8 == written_bits(made) == made.size_bytes * 8
    assert target - 0.25 < written_bits(made) / made.numel <= target
    assert {tensor.n_bits for tensor in made.palettized.values()} <= {2, 3, 4, 6, 8}
    assert made.palettized[EMBEDDING].n_bits >= 2
    assert (
        Recipe.model_validate(made.recipe).rule_for("model.embed_tokens").bits
        == made.palettized[EMBEDDING].n_bits
    )


def test_a_vocabulary_takes_what_the_budget_leaves_it() -> None:
    """The fewer bits, the fewer for the embedding; at 8 bits it has the one LUT that it always has."""
    sizes = [
        edkm_export.palettize(build("plain"), calibration=windows(), target_bits=target).palettized[EMBEDDING]
        for target in (3.2, 4.5, 8.0)
    ]
    bits = [tensor.n_bits for tensor in sizes]
    assert bits == sorted(bits) and bits[0] < 6
    assert [tensor.groups for tensor in sizes] == [(1 if each == 8 else 20, 1) for each in bits]


def test_the_same_command_gives_the_same_bits() -> None:
    first, second = (
        edkm_export.palettize(build("untied"), calibration=windows(), target_bits=4.2) for _ in range(2)
    )
    assert all(tensor.same_bits(second.palettized[name]) for name, tensor in first.palettized.items())


def test_the_decoder_alone_leaves_the_vocabulary_at_8_bits() -> None:
    made = edkm_export.palettize(build("untied"), calibration=windows(), target_decoder_bits=4.6)
    inner = {name: tensor for name, tensor in made.palettized.items() if "proj" in name}
    size = sum(tensor.size_bytes for tensor in inner.values()) * 8 / sum(t.numel for t in inner.values())
    assert 4.2 < size <= 4.6
    assert {made.palettized[name].n_bits for name in (EMBEDDING, "lm_head.weight")} == {8}


def test_rules_of_the_user_are_the_least() -> None:
    recipe = Recipe(rules=(Rule(match="*embed_tokens", bits=6, group_size=8), Rule(bits=2, group_size=8)))
    made = edkm_export.palettize(build("plain"), calibration=windows(), recipe=recipe, target_bits=5.6)
    assert made.palettized[EMBEDDING].n_bits >= 6 and made.palettized[EMBEDDING].group_size == 8


def test_a_model_in_memory_is_left_as_it_is() -> None:
    model = build("plain").half()
    model.lm_head.weight.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    edkm_export.palettize(model, calibration=windows(), target_bits=3.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight.requires_grad
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_bits": 2.0},
            r"--target-bits 2: recipe 2bitg16 takes at least 2\.\d\d bits a weight of LlamaFor",
        ),
        ({"target_bits": 3, "recipe": "4bit"}, "--target-bits 3: recipe 4bitg16 takes at least"),
        ({"target_decoder_bits": 2.0}, "--target-decoder-bits 2: .* bits a weight in the decoder of"),
        ({"target_bits": 4, "target_decoder_bits": 4}, "give one of them"),
        ({"target_bits": 0}, "target_bits: is 0, expected bits a weight"),
        ({"target_bits": 4, "calibration": None}, "needs a --calibration text"),
    ],
)
def test_what_cannot_be_had_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        edkm_export.palettize(build("plain"), **{"calibration": windows(), **options})


def test_the_least_that_is_named_can_be_had() -> None:
    with pytest.raises(InputError) as refused:
        edkm_export.palettize(build("plain"), calibration=windows(), target_bits=2.0)
    least = float(str(refused.value).split("use --target-bits ")[1].split()[0])
    made = edkm_export.palettize(build("plain"), calibration=windows(), target_bits=least)
    assert made.bits_per_weight <= least


def test_budgets_are_of_outlines_too() -> None:
    """What is refused before the weights are read is what would be refused after it."""
    with torch.device("meta"):
        outline = type(build("plain"))(build("plain").config)
    for model in (outline, build("plain")):
        with pytest.raises(InputError, match="takes at least"):
            BitBudget.of(
                model, palettizable_shapes(model), uniform_recipe(2), BitTarget(2.1, whole=True), source="m"
            )


@pytest.mark.parametrize(
    ("bits", "asked", "trained"),
    [(4, None, True), (6, None, False), (8, None, False), (8, True, True), (3, False, False)],
)
def test_a_vocabulary_of_few_bits_is_trained(bits: int, asked: bool | None, trained: bool) -> None:
    model = build("plain")
    rules = (Rule(match="*embed_tokens", bits=bits, group_size=16), *PRESETS["3bit"].rules)
    insert_clusters(model, Recipe(rules=rules), method=ClusterMethod())
    freeze(model, TrainConfig(train_embedding=asked))
    found = {name: clusters.weight.requires_grad for name, clusters in clusters_of(model).items()}
    assert found.pop("model.embed_tokens") == trained and all(found.values())


def test_targets_replace_each_other() -> None:
    config = TrainConfig(target_decoder_bits=3.25).updated({"target_bits": 3.5})
    assert (config.target_bits, config.target_decoder_bits) == (3.5, None) and config.strict_target
    assert config.updated({"target_decoder_bits": 4.0}).target_bits is None
    with pytest.raises(InputError, match="target_decoder_bits: target_bits is over all weights"):
        config.updated({"target_bits": 3.5, "target_decoder_bits": 3.5})


def test_a_run_of_an_older_release_goes_on() -> None:
    """Its `target_bits` was over the decoder, and its embedding was trained only when that was said."""
    now = TrainConfig(target_decoder_bits=3.25)
    old = {
        name: value for name, value in now.model_dump(mode="json").items() if name != "target_decoder_bits"
    }
    old |= {"target_bits": 3.25, "train_embedding": False}
    identity = {"model": {}, "data": [], "tokens_sha256": ""}
    record = RunRecord.model_validate({"identity": identity, "config": old, "recipe": uniform_recipe(3)})
    record.require(Path("run/metadata.json"), record.identity, now)
    with pytest.raises(InputError, match="was started with target_decoder_bits 3.25"):
        record.require(Path("run/metadata.json"), record.identity, TrainConfig(target_decoder_bits=3.5))


def test_a_target_over_all_weights_needs_what_measures_embeddings() -> None:
    config = TrainConfig(bits=2, target_bits=4.5, importance="energy")
    with pytest.raises(InputError, match="--target-bits 4.5: needs --importance fisher"):
        check_target(build("plain"), uniform_recipe(2), config, source="m")
    check_target(build("plain"), uniform_recipe(2), config.updated({"importance": "none"}), source="m")


def test_weights_of_which_nothing_is_known_keep_their_bits() -> None:
    """The head was not called: it stays at 8 bits, and the others share what is left."""
    model = build("untied").requires_grad_(False)
    importance = fisher_factors(model, windows(), vocabulary=True)
    del importance["lm_head"]
    shapes = palettizable_shapes(model)
    budget = BitBudget.of(model, shapes, uniform_recipe(2), BitTarget(5.2, whole=True), source="m")
    seeding = Seeding(lambda name: model.get_submodule(name).weight)
    plan = budget.spend(importance, seeding)
    assert plan.rules["lm_head"].bits == 8 and plan.bits_per_weight <= 5.2
    budget = BitBudget.of(model, shapes, uniform_recipe(2), BitTarget(3.6, whole=True), source="m")
    with pytest.raises(InputError, match="bits are not enough"):
        budget.spend(importance, seeding)


def test_layers_are_fitted_at_the_bits_that_were_chosen() -> None:
    """Effort high: the bits are those without it, the layers are fitted, and the embedding makes up for its errors."""
    tokens = torch.cat([windows(seed) for seed in range(8)])
    plain, high = (
        edkm_export.palettize(build("plain"), calibration=tokens, target_bits=3.6, **options)
        for options in ({}, {"effort": "high", "device": "cpu"})
    )
    assert high.recipe == plain.recipe
    assert high.provenance["target_bits"] == plain.provenance["target_bits"]
    assert high.palettized[EMBEDDING].same_bits(plain.palettized[EMBEDDING])
    assert high.palettized[EMBEDDING].n_bits < 8
    assert written_bits(high) == plain.size_bytes * 8
    layers = high.provenance["reconstruction"]["layers"]
    assert len(layers) == 2 and all(after <= before for before, after in layers.values())
    assert any(after < before for before, after in layers.values())


def test_what_was_measured_moves_whole() -> None:
    """Between processes, by way of the CPU: products, and the further use of a tied embedding, are still there."""
    model = build("plain").requires_grad_(False)
    for name, found in fisher_factors(model, windows(), vocabulary=True).items():
        moved = found.cpu()
        assert (
            (moved.products is None)
            == (found.products is None)
            == (name != "model.embed_tokens" and name != "lm_head")
        )
        shape = model.get_submodule(name).weight.shape
        assert torch.equal(moved.of_weights(*shape), found.of_weights(*shape))
        if found.products is not None:
            assert torch.equal(moved.row_cost(), found.row_cost())


def test_train_says_what_it_does_with_the_embedding(edkm: Any, work: Path, small_folder: Path) -> None:
    (work / "quick.yaml").write_text("calibration_tokens: 128\ncontext: 32\nbatch_size: 2\nsteps: 1\n")
    options = ("--data", DATA, "-o", "run", "--config", "quick.yaml", "--device", "cpu")
    result = edkm("train", small_folder, "--target-bits", 4.5, *options)
    assert result.status == 0, result.err
    assert "embedding and output head are trained, with less than 6 bits" in result.err
    made = load(work / "run" / "model.pt")
    predicted = float(result.err.split("plan: ")[1].split()[0])
    assert predicted == round(made.bits_per_weight, 2) == round(written_bits(made) / made.numel, 2) <= 4.5
    assert made.palettized[EMBEDDING].n_bits < 6
    assert f"{made.bits_per_weight:.2f} over all weights" in result.out


def test_palettize_says_its_plan(edkm: Any, work: Path, small_folder: Path) -> None:
    result = edkm(
        "palettize", small_folder, "--target-bits", 4.5, "--calibration", DATA, "--calibration-tokens", 256,
        "--no-estimate",
    )  # fmt: skip
    assert result.status == 0, result.err
    made = load(work / "model.pt")
    predicted = float(result.err.split("plan: ")[1].split()[0])
    assert predicted == round(written_bits(made) / made.numel, 2) <= 4.5
    assert f"{predicted:.2f} bits a weight" in result.out and "model.embed_tokens" in result.err
