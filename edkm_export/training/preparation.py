"""What happens before the first step: statistics, scales, bits, seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from edkm_export.activity import activity
from edkm_export.calibration import input_energy
from edkm_export.recipe import Recipe, Rule, uniform_recipe
from edkm_export.reference.conv1d import held_weight
from edkm_export.training.palettized.clusters import ClusterMethod
from edkm_export.training.palettized.surgery import Importance, clusters_of, insert_clusters, trainable_shapes
from edkm_export.training.scaling import fold_scales
from edkm_export.training.sensitivity import (
    Sensitivity,
    allocate_bits,
    average_bits,
    fisher_factors,
    mixed_recipe,
)
from edkm_export.training.train_config import TrainConfig

__all__ = ["base_recipe", "decoder_bits", "insert", "prepare"]

Announce = Callable[[str], None]


def base_recipe(config: TrainConfig) -> Recipe:
    """The recipe of the settings, before bits are mixed."""
    return uniform_recipe(config.bits, config.group_size, config.lut_dtype)


def _inner_plan(model: Any, plan: dict[str, Rule]) -> dict[str, Rule]:
    """The part of a plan that is neither embedding nor output head."""
    outer = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name: rule for name, rule in plan.items() if model.get_submodule(name) not in outer}


def _importance(model: Any, windows: Tensor, config: TrainConfig) -> dict[str, Importance]:
    if config.importance == "fisher":
        return fisher_factors(model, windows, seed=config.seed)
    if config.importance == "energy":
        return {name: Importance(energy) for name, energy in input_energy(model, windows).items()}
    return {}


def prepare(
    model: Any, recipe: Recipe, config: TrainConfig, windows: Tensor, *, source: str, announce: Announce
) -> Recipe:
    """Palettize a float model for training.

    Args:
        model: changed in place.
        recipe: bits, groups and LUT dtype by module name.
        config: settings.
        windows: calibration tokens, int64 [windows, context].
        source: name of the model, for messages.
        announce: called with the name of each stage before it starts.

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
    seeds = None
    if config.target_bits is not None:
        announce("choosing bits layer by layer")
        weights = {name: held_weight(model.get_submodule(name)) for name in plan if len(shapes[name]) == 2}
        known = importance or {
            name: Importance(torch.ones(weight.shape[1])) for name, weight in weights.items()
        }
        found = Sensitivity(weights, plan, known)
        budget = int(config.target_bits * sum(weights[name].numel() for name in found.sizes))
        with activity("trying sizes", unit="sizes") as tried:

            def loss(name: str, bits: int) -> float:
                tried.done = len(found.seeds)
                return found.loss(name, bits)

            recipe = mixed_recipe(recipe, allocate_bits(found.sizes, loss, budget), plan)
        seeds = found.seeds
    announce("clustering")
    insert(model, recipe, config, importance=importance, seeds=seeds, source=source)
    return recipe


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
