"""How many bits each weight gets, so that all of them together take a given average.

`--target-bits` counts as the size of a file does: every parameter, with LUTs and their scales, and what stays dense as
float16, in which it ships. `--target-decoder-bits` counts the layers between embedding and output head alone, which
have the bits of their rules then.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edkm_export.activity import activity
from edkm_export.errors import InputError
from edkm_export.packing import SUPPORTED_BITS
from edkm_export.quantities import short_size
from edkm_export.recipe import Recipe, Rule, is_default_outer
from edkm_export.reference.stored_buffers import stored_buffers
from edkm_export.training.first_centroids import Seeding
from edkm_export.training.palettized.surgery import Importance
from edkm_export.training.sensitivity import Sensitivity, allocate_bits, mixed_recipe
from edkm_export.weight_storage import storage_bits

__all__ = ["LEAST_BITS", "TRAINED_BELOW", "BitBudget", "BitPlan", "BitTarget", "outer_modules"]

TRAINED_BELOW = 6
"""Bits below which embedding and output head are trained: with 6 and more, clusters of one shot are close enough."""

_SAMPLED = 1 << 16  # weights of a layer that stand for it in the search
_DENSE_BITS = 16
LEAST_BITS = 2
"""Where a search begins, unless other bits are asked for; and the fewest of embedding and output head."""


@dataclass(frozen=True)
class BitTarget:
    """An average that was asked for.

    Attributes:
        bits: a weight.
        whole: over all weights; otherwise over those of the decoder.
    """

    bits: float
    whole: bool

    @property
    def option(self) -> str:
        """As the command line takes it."""
        return f"--target-{'' if self.whole else 'decoder-'}bits {self.bits:g}"


@dataclass(frozen=True)
class BitPlan:
    """What was chosen.

    Attributes:
        recipe: with a rule for each weight that differs from the recipe it was chosen from.
        rules: {module name: rule} of all palettized weights.
        outer: names of embedding and output head among them.
        size_bytes: of all parameters, to the byte what `Checkpoint.size_bytes` will be.
        bits_per_weight: likewise.
        seeds: {(module name, bits): centroids [groups, k]} of those that were clustered whole on the way.
    """

    recipe: Recipe
    rules: Mapping[str, Rule]
    outer: frozenset[str]
    size_bytes: int
    bits_per_weight: float
    seeds: Mapping[tuple[str, int], Tensor]

    @property
    def trains_outer(self) -> bool:
        """Whether embedding or output head has so few bits that it should be trained."""
        return any(self.rules[name].bits < TRAINED_BELOW for name in self.outer)

    def words(self) -> str:
        """For people."""
        parts = [f"{self.bits_per_weight:.2f} bits a weight over all weights, {short_size(self.size_bytes)}"]
        for name in sorted(self.outer):
            rule = self.rules[name]
            groups = f"LUTs for {rule.group_size} rows" if rule.group_size else "one LUT"
            parts.append(f"{name} {rule.bits} bits, {groups}")
        counts: dict[int, int] = {}
        for name, rule in self.rules.items():
            if name not in self.outer:
                counts[rule.bits] = counts.get(rule.bits, 0) + 1
        parts.append(
            "other weights " + ", ".join(f"{counts[bits]} of {bits} bits" for bits in sorted(counts))
        )
        return "; ".join(parts)


@dataclass(frozen=True)
class BitBudget:
    """The weights of a model, what each of them may take, and how much there is.

    Attributes:
        target: the average.
        shapes: {module name: weight shape} of all that are palettized.
        plan: {module name: rule} of the recipe.
        choices: {module name: {bits: rule}} of those that the target is about.
        outer: names of embedding and output head.
        dense_numel: parameters that stay dense.
        recipe: that the rules are of.
        source: name of the model, for messages.
    """

    target: BitTarget
    shapes: Mapping[str, tuple[int, ...]]
    plan: Mapping[str, Rule]
    choices: Mapping[str, Mapping[int, Rule]]
    outer: frozenset[str]
    dense_numel: int
    recipe: Recipe
    source: str

    @classmethod
    def of(
        cls,
        model: nn.Module,
        shapes: Mapping[str, tuple[int, ...]],
        recipe: Recipe,
        target: BitTarget,
        *,
        source: str,
    ) -> BitBudget:
        """Of a model of transformers; an outline will do.

        Args:
            model: the model.
            shapes: {module name: weight shape} of what can be palettized.
            recipe: its bits are the least of each weight. Embedding and output head may have fewer where the recipe
                has no rule of its own for them but that of `uniform_recipe`: from 2 bits, in the groups of its last
                rule.
            target: the average.
            source: name of the model, for messages.

        Raises:
            RecipeError, PaletteError: the recipe does not fit the model.
            InputError: not even the least bits are within the target; the message names what is.
        """
        plan = recipe.plan(shapes, source)
        outer = outer_modules(model, plan)
        choices = {
            name: _choices(recipe, name, rule, shapes[name], is_outer=name in outer)
            for name, rule in plan.items()
            if len(shapes[name]) == 2 and (target.whole or name not in outer)
        }
        parameters = {id(each): each.numel() for each in model.parameters()}
        buffers = sum(each.numel() for each in stored_buffers(model).values())
        palettized = sum(math.prod(shapes[name]) for name in plan)
        dense = sum(parameters.values()) + buffers - palettized
        made = cls(target, shapes, plan, choices, outer, dense, recipe, source)
        made._require_possible()
        return made

    @property
    def _numel(self) -> int:
        """Weights that the average is over."""
        if not self.target.whole:
            return sum(math.prod(self.shapes[name]) for name in self.choices)
        return self.dense_numel + sum(math.prod(self.shapes[name]) for name in self.plan)

    @property
    def _fixed_bits(self) -> int:
        """Storage of what counts and is not chosen."""
        if not self.target.whole:
            return 0
        kept = (name for name in self.plan if name not in self.choices)
        return self.dense_numel * _DENSE_BITS + sum(self._bits(name, self.plan[name]) for name in kept)

    def _bits(self, name: str, rule: Rule) -> int:
        return storage_bits(self.shapes[name], rule)

    def _require_possible(self) -> None:
        least = self._fixed_bits + sum(
            min(self._bits(name, rule) for rule in rules.values()) for name, rules in self.choices.items()
        )
        if least > self.target.bits * self._numel:
            average = f"{math.ceil(least / self._numel * 100 - 1e-9) / 100:.2f}"
            option = self.target.option.split()[0]
            of = "" if self.target.whole else "in the decoder "
            raise InputError(
                f"{self.target.option}: recipe {self.recipe.name} takes at least {average} bits a weight {of}of "
                f"{self.source}, everything that is stored included; use {option} {average} or more, fewer --bits, or "
                "a larger --group-size."
            )

    def spend(self, importance: Mapping[str, Importance], seeding: Seeding) -> BitPlan:
        """Choose bits for each weight, the most where they lower the loss most.

        Args:
            importance: {module name: Fisher factors}; weights without keep the bits of the recipe. Empty: all weights
                alike.
            seeding: reads and clusters the weights; of several processes, all of them choose together.
        """
        outlines = {name: torch.empty(self.shapes[name], device="meta") for name in self.choices}
        known = importance or {name: Importance(torch.ones(each.shape[1])) for name, each in outlines.items()}
        found = Sensitivity(outlines, self.choices, known, seeding, sampled=_SAMPLED)
        unknown = {name: self.plan[name].bits for name in self.choices if name not in found.sizes}
        taken = sum(self._bits(name, self.choices[name][bits]) for name, bits in unknown.items())
        budget = int(self.target.bits * self._numel) - self._fixed_bits - taken
        with activity("choosing bits weight by weight", unit="sizes") as tried:
            found.cluster_smallest()

            def loss(name: str, bits: int) -> float:
                tried.done = found.tried
                return found.loss(name, bits)

            chosen = allocate_bits(found.sizes, loss, budget)
        rules = {name: self.choices[name][bits] for name, bits in (unknown | chosen).items()}
        seeds = {key: each for key, each in found.seeds.items() if rules[key[0]].bits == key[1]}
        return self._made(rules, seeds)

    def _made(self, chosen: Mapping[str, Rule], seeds: Mapping[tuple[str, int], Tensor]) -> BitPlan:
        rules = {**self.plan, **chosen}
        numel = self.dense_numel + sum(math.prod(self.shapes[name]) for name in rules)
        bits = self.dense_numel * _DENSE_BITS + sum(self._stored(name, rule) for name, rule in rules.items())
        recipe = mixed_recipe(self.recipe, chosen, self.plan)
        return BitPlan(recipe, rules, self.outer, bits // 8, bits / numel, seeds)

    def _stored(self, name: str, rule: Rule) -> int:
        """Bits of a weight, in whole bytes."""
        return -(-self._bits(name, rule) // 8) * 8


def _choices(
    recipe: Recipe, name: str, rule: Rule, shape: tuple[int, ...], *, is_outer: bool
) -> dict[int, Rule]:
    if not (is_outer and is_default_outer(recipe, name)):
        return {bits: rule.with_bits(bits) for bits in SUPPORTED_BITS if bits >= rule.bits}
    inner = recipe.rules[-1].model_copy(update={"match": rule.match, "optional": True})
    narrow = (inner.with_bits(bits) for bits in SUPPORTED_BITS if LEAST_BITS <= bits < rule.bits)
    fitted = (each.fitted(shape[0]) for each in narrow)
    whole = storage_bits(shape, rule)  # LUTs for few narrow rows can take more than what they save
    return {each.bits: each for each in fitted if storage_bits(shape, each) < whole} | {rule.bits: rule}


def outer_modules(model: Any, names: Iterable[str]) -> frozenset[str]:
    """Those of some modules that are input embedding or output head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return frozenset(name for name in names if any(model.get_submodule(name) is end for end in ends))
