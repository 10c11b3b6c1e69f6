"""What happens before the first step: statistics, scales, bits, seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
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
from edkm_export.training.distributed.processes import ALONE, Processes
from edkm_export.training.first_centroids import Seeding
from edkm_export.training.palettized.clusters import ClusterMethod
from edkm_export.training.palettized.surgery import (
    Importance,
    clusters_of,
    importance_of,
    insert_clusters,
    trainable_shapes,
)
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

__all__ = [
    "Chosen",
    "Preparation",
    "base_recipe",
    "bits_told",
    "check_target",
    "decoder_bits",
    "fitting_bits",
    "insert",
    "measures",
    "method_of",
]

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


@dataclass(frozen=True)
class Chosen:
    """What preparation found out.

    Attributes:
        recipe: with the bits that were chosen layer by layer.
        seeds: first centroids of each weight, {(module name, bits): float64 [groups, k]}.
        scales: what was folded into parameters, {name: factors of the last axis}.
    """

    recipe: Recipe
    seeds: dict[tuple[str, int], Tensor]
    scales: dict[str, Tensor]


@dataclass(frozen=True)
class Preparation:
    """What happens to a float model before it is palettized for training.

    Several processes prepare it together: each runs the model, of which it has a share, and clusters a part of the
    weights. What the first one measures holds for all: sums on a GPU are not the same to the last bit everywhere.

    Attributes:
        model: the float model; where nothing is measured (`measures`), its outline is enough.
        config: settings.
        source: name of the model, for messages.
        announce: called with the name of each stage before it starts.
        device: where the model computes.
        weights: reads a layer's weight [out, in, ...] as the source has it; None: the model holds it whole, with the
            scales that were folded into it.
        processes: that prepare it.
        tell: called with what was chosen, for people, in the first process.
    """

    model: Any
    config: TrainConfig
    source: str
    announce: Announce
    device: str
    weights: Callable[[str], Tensor] | None = None
    processes: Processes = ALONE
    tell: Announce = lambda _line: None

    def choose(self, recipe: Recipe, windows: Tensor) -> Chosen:
        """Choose scales, bits and centroids.

        Args:
            recipe: bits, groups and LUT dtype by module name.
            windows: calibration tokens, int64 [windows, context].

        Raises:
            RecipeError, PaletteError, InputError: the recipe or the target does not fit the model.
        """
        shapes = trainable_shapes(self.model)
        plan = _inner_plan(self.model, recipe.plan(shapes, self.source))
        self.announce("measuring which weights matter")
        importance = self._importance(windows.to(self.device))
        scales: dict[str, Tensor] = {}
        if self.config.fold_scales and importance:
            self.announce("folding scales into the norms")
            importance = fold_scales(
                self.model,
                windows[0].to(self.device),
                plan,
                importance,
                weights=self.weights,
                decide=self.processes.first,
                scales=scales,
            )
        seeding = Seeding(partial(self._weight, scales), self.processes, source=self.source)
        seeds: dict[tuple[str, int], Tensor] = {}
        target = self.config.target
        if target is not None and target.whole:
            self.announce("choosing bits weight by weight")
            budget = BitBudget.of(self.model, shapes, recipe, target, source=self.source)
            made = budget.spend(importance, seeding)
            recipe, seeds = made.recipe, dict(made.seeds)
            if self.processes.is_first:
                self.tell(_described(made, self.config))
        elif target is not None:
            self.announce("choosing bits layer by layer")
            recipe, seeds = self._mix_bits(recipe, plan, shapes, importance, seeding, target)
        self.announce("clustering")
        known = importance_of(self.model, shapes, importance)
        left = [job for job in recipe.plan(shapes, self.source).items() if (job[0], job[1].bits) not in seeds]
        seeds |= {key: centroids for key, (centroids, _) in seeding.find(left, known).items()}
        return Chosen(recipe, seeds, scales)

    def _weight(self, scales: Mapping[str, Tensor], name: str) -> Tensor:
        """A layer's weight [out, in, ...] with what was folded into it."""
        if self.weights is None:
            return held_weight(self.model.get_submodule(name))
        weight, scale = self.weights(name), scales.get(f"{name}.weight")
        return weight if scale is None else weight * scale

    def _importance(self, windows: Tensor) -> dict[str, Importance]:
        found: dict[str, Importance] = {}
        config = self.config
        if config.importance == "fisher":
            vocabulary = config.target_bits is not None
            found = fisher_factors(self.model, windows, seed=config.seed, vocabulary=vocabulary)
        elif config.importance == "energy":
            found = {name: Importance(energy) for name, energy in input_energy(self.model, windows).items()}
        if not self.processes.are_many:
            return found
        return self.processes.first(lambda: {name: each.cpu() for name, each in found.items()})

    def _mix_bits(
        self,
        recipe: Recipe,
        plan: Mapping[str, Rule],
        shapes: Mapping[str, tuple[int, ...]],
        importance: Mapping[str, Importance],
        seeding: Seeding,
        target: BitTarget,
    ) -> tuple[Recipe, dict[tuple[str, int], Tensor]]:
        """More bits for sensitive layers; the recipe, and what was clustered for it."""
        outlines = {name: torch.empty(shapes[name], device="meta") for name in plan if len(shapes[name]) == 2}
        known = importance or {name: Importance(torch.ones(each.shape[1])) for name, each in outlines.items()}
        choices = {name: wider_rules(plan[name]) for name in outlines}
        found = Sensitivity(outlines, choices, known, seeding)
        budget = int(target.bits * sum(outlines[name].numel() for name in found.sizes))
        if (
            not self.config.strict_target
        ):  # LUTs of small layers may take more than what a preset leaves for them
            budget = max(budget, sum(storage_bits(shapes[name], plan[name]) for name in found.sizes))
        with activity("trying sizes", unit="sizes") as tried:
            found.cluster_smallest()

            def loss(name: str, bits: int) -> float:
                tried.done = len(found.seeds)
                return found.loss(name, bits)

            chosen = allocate_bits(found.sizes, loss, budget)
            mixed = {name: choices[name][bits] for name, bits in chosen.items()}
            return mixed_recipe(recipe, mixed, plan), found.seeds


def measures(config: TrainConfig) -> bool:
    """Whether preparation runs the float model, so that its outline is not enough."""
    return config.importance != "none"


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


def bits_told(model: Any, recipe: Recipe, target: float | None) -> list[str]:
    """What the choice of bits came to, and which groups are not of the size that was aimed at, for the user."""
    found = decoder_bits(model)
    digits = 2 if target is None or round(found, 2) > target or found <= target else 3
    line = f"{found:.{digits}f} bits a weight of the decoder, LUTs included"
    if target is not None and found > target:
        line += f" ({target:g} was aimed at: the LUTs of this model's small layers take more)"
    shapes = {name: tuple(each.weight.shape) for name, each in clusters_of(model).items()}
    return [line, *filter(None, [recipe.regrouped(shapes)])]


def insert(
    model: Any,
    recipe: Recipe,
    config: TrainConfig,
    *,
    seeds: Mapping[tuple[str, int], Tensor] | None = None,
    seeded: bool = True,
    source: str,
) -> None:
    """Replace the layers; with `seeded=False`, for a checkpoint of the run to be loaded."""
    insert_clusters(
        model,
        recipe,
        method=method_of(config),
        seeds=seeds,
        seeded=seeded,
        in_bfloat16=config.bf16,
        source=source,
    )


def method_of(config: TrainConfig) -> ClusterMethod:
    """How gradients pass the clustering."""
    return ClusterMethod(config.backward, config.alpha, config.iterations)
