"""What happens before the first step: statistics, scales, bits, seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from edkm_export.activity import activity
from edkm_export.calibration import input_energy
from edkm_export.errors import InputError
from edkm_export.lut_dtypes import LUT_DTYPES, LutDtype
from edkm_export.packing import SUPPORTED_BITS
from edkm_export.recipe import Recipe, Rule, uniform_recipe
from edkm_export.reference.conv1d import held_weight
from edkm_export.training.bit_budget import (
    LEAST_BITS,
    TRAINED_BELOW,
    BitBudget,
    BitPlan,
    BitTarget,
    outer_modules,
)
from edkm_export.training.palettized.clusters import ClusterMethod
from edkm_export.training.palettized.surgery import Importance, clusters_of, insert_clusters, trainable_shapes
from edkm_export.training.scaling import fold_scales
from edkm_export.training.sensitivity import (
    Sensitivity,
    allocate_bits,
    fisher_factors,
    mixed_recipe,
    wider_rules,
)
from edkm_export.training.train_config import TrainConfig
from edkm_export.weight_storage import average_bits, storage_bits

__all__ = ["base_recipe", "check_target", "decoder_bits", "fitting_bits", "insert", "prepare"]

Announce = Callable[[str], None]


def base_recipe(config: TrainConfig) -> Recipe:
    """The recipe of the settings, before bits are mixed."""
    return uniform_recipe(
        config.bits, config.group_size, config.lut_dtype, fit_groups=not config.strict_groups
    )


def _inner_plan(model: Any, plan: dict[str, Rule]) -> dict[str, Rule]:
    """The part of a plan that is neither embedding nor output head."""
    outer = outer_modules(model, plan)
    return {name: rule for name, rule in plan.items() if name not in outer}


def check_target(model: Any, recipe: Recipe, config: TrainConfig, *, source: str) -> None:
    """Refuse a recipe or a target that does not fit a model; values of the weights are not looked at.

    Args:
        model: of transformers; an outline will do.
        recipe: bits, groups and LUT dtype by module name, before bits are mixed.
        config: settings.
        source: name of the model, for messages.

    Raises:
        RecipeError, PaletteError: the recipe does not fit.
        InputError: the target is strict, and below what the recipe takes; the message names the least that it can be.
    """
    shapes = trainable_shapes(model)
    plan = _inner_plan(model, recipe.plan(shapes, source))
    target = config.target
    if target is None or not config.strict_target:
        return
    if target.whole:
        if config.importance == "energy":  # nothing is known of what is looked up then
            raise InputError(f"{target.option}: needs --importance fisher, which measures embeddings too.")
        BitBudget.of(model, shapes, recipe, target, source=source)
        return
    plan = {name: rule for name, rule in plan.items() if len(shapes[name]) == 2}
    if average_bits(shapes, plan) > target.bits:
        raise InputError(
            f"{target.option}: recipe {recipe.name} takes {_at_least(shapes, plan)} bits a weight in the decoder of "
            f"{source}, LUTs included; use --target-decoder-bits {_at_least(shapes, plan)} or more, fewer --bits, or a "
            "larger --group-size."
        )


def fitting_bits(
    model: Any, target: BitTarget, group_size: int, lut_dtype: LutDtype, *, fit_groups: bool, source: str
) -> int:
    """The bits to begin with when a target alone was given.

    Over the decoder these are the most that all layers can have within it, over all weights `LEAST_BITS`.

    Raises:
        InputError: not even one bit can; the message names the least average that a model can have.
        PaletteError: the groups do not fit.
    """
    shapes = trainable_shapes(model)
    if target.whole:
        return LEAST_BITS
    least = ""
    for bits in sorted(SUPPORTED_BITS, reverse=True):
        if bits > LUT_DTYPES[lut_dtype].max_bits:
            continue
        recipe = uniform_recipe(bits, group_size, lut_dtype, fit_groups=fit_groups)
        plan = _inner_plan(model, recipe.plan(shapes, source))
        plan = {name: rule for name, rule in plan.items() if len(shapes[name]) == 2}
        if average_bits(shapes, plan) <= target.bits:
            return bits
        least = _at_least(shapes, plan)
    raise InputError(
        f"{target.option}: {source} takes at least {least} bits a weight in the decoder, 1 bit and its LUTs; "
        f"use --target-decoder-bits {least} or more, or a larger --group-size."
    )


def _at_least(shapes: Mapping[str, tuple[int, ...]], plan: Mapping[str, Rule]) -> str:
    """The average of a plan in two decimals, rounded up: as a target it can be met."""
    return f"{math.ceil(average_bits(shapes, plan) * 100 - 1e-9) / 100:.2f}"


def _importance(model: Any, windows: Tensor, config: TrainConfig) -> dict[str, Importance]:
    if config.importance == "fisher":
        return fisher_factors(model, windows, seed=config.seed, vocabulary=config.target_bits is not None)
    if config.importance == "energy":
        return {name: Importance(energy) for name, energy in input_energy(model, windows).items()}
    return {}


def prepare(
    model: Any,
    recipe: Recipe,
    config: TrainConfig,
    windows: Tensor,
    *,
    source: str,
    announce: Announce,
    tell: Announce = lambda _line: None,
) -> Recipe:
    """Palettize a float model for training.

    Args:
        model: changed in place.
        recipe: bits, groups and LUT dtype by module name.
        config: settings.
        windows: calibration tokens, int64 [windows, context].
        source: name of the model, for messages.
        announce: called with the name of each stage before it starts.
        tell: called with what was chosen, for people.

    Returns:
        The recipe that was used, with the bits that were chosen layer by layer.

    Raises:
        RecipeError, PaletteError, InputError: the recipe or the target does not fit the model.
    """
    shapes = trainable_shapes(model)
    plan = _inner_plan(model, recipe.plan(shapes, source))
    windows = windows.to(next(model.parameters()).device)
    announce("measuring which weights matter")
    importance = _importance(model, windows, config)
    if config.fold_scales and importance:
        announce("folding scales into the norms")
        importance = fold_scales(model, windows[0], plan, importance)
    seeds, target = None, config.target
    if target is not None and target.whole:
        announce("choosing bits weight by weight")
        made = BitBudget.of(model, shapes, recipe, target, source=source).spend(model, importance)
        recipe = made.recipe
        tell(_described(made, config))
    elif target is not None:
        announce("choosing bits layer by layer")
        weights = {name: held_weight(model.get_submodule(name)) for name in plan if len(shapes[name]) == 2}
        known = importance or {
            name: Importance(torch.ones(weight.shape[1])) for name, weight in weights.items()
        }
        choices = {name: wider_rules(plan[name]) for name in weights}
        found = Sensitivity(weights, choices, known)
        budget = int(target.bits * sum(weights[name].numel() for name in found.sizes))
        if not config.strict_target:  # LUTs of small layers may take more than what a preset leaves for them
            budget = max(budget, sum(storage_bits(shapes[name], plan[name]) for name in found.sizes))
        with activity("trying sizes", unit="sizes") as tried:

            def loss(name: str, bits: int) -> float:
                tried.done = len(found.seeds)
                return found.loss(name, bits)

            chosen = allocate_bits(found.sizes, loss, budget)
            recipe = mixed_recipe(recipe, {name: choices[name][bits] for name, bits in chosen.items()}, plan)
        seeds = found.seeds
    announce("clustering")
    insert(model, recipe, config, importance=importance, seeds=seeds, source=source)
    return recipe


def _described(made: BitPlan, config: TrainConfig) -> str:
    """What was chosen, and what becomes of embedding and output head."""
    if config.train_embedding is None:
        why = f"less than {TRAINED_BELOW} bits" if made.trains_outer else f"{TRAINED_BELOW} bits or more"
        trained = f"{'trained' if made.trains_outer else 'not trained'}, with {why}"
    else:
        trained = "trained, as asked" if config.train_embedding else "not trained, as asked"
    return f"plan: {made.words()}; embedding and output head are {trained}"


def decoder_bits(model: Any) -> float:
    """Average bits over the decoder's layers of a palettized model, LUTs included."""
    clusters = clusters_of(model)
    plan = _inner_plan(model, {name: each.rule for name, each in clusters.items()})
    return average_bits({name: tuple(clusters[name].weight.shape) for name in plan}, plan)


def insert(
    model: Any,
    recipe: Recipe,
    config: TrainConfig,
    *,
    importance: dict[str, Importance] | None = None,
    seeds: dict[tuple[str, int], Tensor] | None = None,
    seeded: bool = True,
    source: str,
) -> None:
    """Replace the layers; with `seeded=False`, for a checkpoint of the run to be loaded."""
    method = ClusterMethod(config.backward, config.alpha, config.iterations)
    insert_clusters(
        model,
        recipe,
        method=method,
        importance=importance or None,
        seeds=seeds,
        seeded=seeded,
        in_bfloat16=config.bf16,
        source=source,
    )
