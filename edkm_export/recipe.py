"""Recipes: which weight gets which bits, groups and LUT dtype.

A recipe is a list of rules; the first one whose pattern matches a module's name decides. In YAML:

    name: my-recipe
    rules:
      - {match: "model.embed_tokens", bits: 8, group_size: 0}
      - {match: "*.mlp.down_proj", bits: 4, group_size: 8}
      - {match: "lm_head", skip: true}
      - {match: "*", bits: 3, group_size: 16}
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pydantic

from edkm_export.errors import RecipeError
from edkm_export.lut_dtypes import LutDtype
from edkm_export.lut_grid import check_bits, suited
from edkm_export.packing import SUPPORTED_BITS
from edkm_export.palette import check_grouping
from edkm_export.regular_file import read_regular
from edkm_export.yaml_text import YamlError, load_yaml

__all__ = ["PRESETS", "Recipe", "Rule", "is_default_outer", "load_recipe", "uniform_recipe"]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Rule(_Strict):
    """What happens to the modules whose name matches.

    Attributes:
        match: shell pattern (`*`, `?`, `[...]`) for the module's name, such as "model.layers.*.mlp.*".
        bits: bits of an index, one of 1, 2, 3, 4, 6, 8.
        group_size: output rows that share a LUT; 0: one LUT for the whole weight.
        fit_groups: where `group_size` does not divide the rows of a weight, take the divisor nearest to it; otherwise
            such a weight is refused.
        lut_dtype: key of `lut_dtypes.LUT_DTYPES`: "float16", or "int8" or "int4", whose entries are integers with one
            float16 scale a LUT. "int4" has 16 levels, -8 to 7, for indices of at most 3 bits; it is stored as int8.
        skip: leave the weight as it is, in float16.
        optional: no error when nothing matches (a tied output head is not a module of its own).
    """

    match: str = "*"
    bits: int = 4
    group_size: int = pydantic.Field(default=16, ge=0)
    fit_groups: bool = False
    lut_dtype: LutDtype = "float16"
    skip: bool = False
    optional: bool = False

    @pydantic.field_validator("bits")
    @classmethod
    def _supported(cls, bits: int) -> int:
        if bits not in SUPPORTED_BITS:
            raise ValueError(
                f"no deployment target can hold {bits} bits, use one of {', '.join(map(str, SUPPORTED_BITS))}"
            )
        return bits

    @pydantic.field_validator("lut_dtype")
    @classmethod
    def _chooses(cls, lut_dtype: LutDtype, info: pydantic.ValidationInfo) -> LutDtype:
        check_bits(lut_dtype, info.data.get("bits", 0))  # bits that are wrong have their own message
        return lut_dtype

    def with_bits(self, bits: int) -> Rule:
        """The same at other bits; the grid is int8 where int4 would leave nothing to choose."""
        return self.model_copy(update={"bits": bits, "lut_dtype": suited(self.lut_dtype, bits)})

    def fitted(self, rows: int) -> Rule:
        """The same for a weight of so many rows: with `fit_groups`, a group size that divides them."""
        if not self.fit_groups or not self.group_size or rows % self.group_size == 0:
            return self
        divisors = [size for size in range(1, rows + 1) if rows % size == 0]
        nearest = min(divisors, key=lambda size: abs(math.log(size / self.group_size)))
        return self.model_copy(update={"group_size": 0 if nearest == rows else nearest})


class Recipe(_Strict):
    """An ordered list of rules."""

    name: str = "custom"
    rules: tuple[Rule, ...] = pydantic.Field(min_length=1)

    def rule_for(self, module: str) -> Rule | None:
        """The first rule that matches, None for a weight that is to stay dense."""
        for rule in self.rules:
            if fnmatch.fnmatchcase(module, rule.match):
                return None if rule.skip else rule
        return None

    def plan(self, shapes: Mapping[str, Sequence[int]], source: str) -> dict[str, Rule]:
        """Apply the rules to a model before any long work.

        Args:
            shapes: {module name: (out, in, ...)} of every weight that can be palettized.
            source: name of the model, for messages.

        Returns:
            {module name: rule} of those that will be, with the group sizes that they get.

        Raises:
            RecipeError: a rule matches nothing, or a group size does not divide.
        """
        plan: dict[str, Rule] = {}
        for rule in self.rules:
            if not rule.optional and not any(fnmatch.fnmatchcase(module, rule.match) for module in shapes):
                known = ", ".join(list(shapes)[:6])
                raise RecipeError(
                    f"{source}: recipe '{self.name}': no module matches '{rule.match}'; its modules are {known}, ..."
                )
        for module, shape in shapes.items():
            rule_found = self.rule_for(module)
            if rule_found is None:
                continue
            rule_found = rule_found.fitted(shape[0])
            weight = f"{module}.weight" if module else "weight"  # the model is the layer itself
            check_grouping(f"{source}: {weight}", shape[0], rule_found.group_size)
            plan[module] = rule_found
        return plan

    def regrouped(self, shapes: Mapping[str, Sequence[int]]) -> str:
        """What to tell of weights whose groups `fit_groups` changed; empty when there are none."""
        found = []
        for module, shape in shapes.items():
            rule = self.rule_for(module)
            if rule is not None and (size := rule.fitted(shape[0]).group_size) != rule.group_size:
                found.append((module, rule.group_size, size or shape[0]))
        if not found:
            return ""
        module, asked, size = found[0]
        return (
            f"{len(found)} weights have LUTs for other numbers of rows than {asked}, which does not divide theirs "
            f"(the first: {module}, {size})"
        )


# Embeddings and output heads, by the names that the supported families use.
_OUTER = (
    "*embed_tokens",
    "*lm_head",
    "*transformer.wte",
    "*word_embeddings",
    "*tok_embeddings",
    "dense.[0-9]*",  # what an embedding model does with its pooled vector
)
# Tables of learned positions and token types: small, and added to every token. Convolutions along the text have a few
# weights a channel: their LUTs would be larger than they are. What strength and decay of a recurrence are made of is a
# thousandth of a model, and an error of it grows with every token. Coefficients between residual streams are a few
# numbers a layer, and multiply whole streams.
_DENSE = (
    "*transformer.wpe",
    "*position_embeddings",
    "*token_type_embeddings",
    "*.conv.conv",
    "*.linear_attn.conv1d",
    "*.linear_attn.in_proj_a",
    "*.linear_attn.in_proj_b",
    "*.altup.*_coefs",
    "*.altup.modality_router",
)


def uniform_recipe(
    bits: int = 4, group_size: int = 16, lut_dtype: LutDtype = "float16", *, fit_groups: bool = False
) -> Recipe:
    """The default: linear layers at `bits` in groups, embedding and output head at 8 bits with one LUT each.

    With an int4 grid in the linear layers, embedding and output head have an int8 one. `fit_groups` as in `Rule`.

    Raises:
        RecipeError: `bits` or `group_size` is not supported, or not with this LUT dtype.
    """
    try:
        inner = Rule(match="*", bits=bits, group_size=group_size, fit_groups=fit_groups, lut_dtype=lut_dtype)
        wide = suited(lut_dtype, 8)
        outer = [
            Rule(match=pattern, bits=8, group_size=0, lut_dtype=wide, optional=True) for pattern in _OUTER
        ]
    except pydantic.ValidationError as error:
        raise RecipeError(_explain(error)) from error
    suffix = f"g{group_size}" if group_size else ""
    dense = [Rule(match=pattern, lut_dtype=wide, skip=True, optional=True) for pattern in _DENSE]
    return Recipe(name=f"{bits}bit{suffix}", rules=(*outer, *dense, inner))


def is_default_outer(recipe: Recipe, module: str) -> bool:
    """Whether a module has the rule that `uniform_recipe` gives embeddings and output heads, not one of the user's."""
    rule = recipe.rule_for(module)
    return (
        rule is not None and rule.optional and rule.match in _OUTER and (rule.bits, rule.group_size) == (8, 0)
    )


def _preset(name: str, bits: int, group_size: int = 16, lut_dtype: LutDtype = "float16") -> Recipe:
    recipe = uniform_recipe(bits, group_size, lut_dtype, fit_groups=True)
    return recipe.model_copy(update={"name": name})


PRESETS: dict[str, Recipe] = {
    "8bit": _preset("8bitg16", 8),
    "6bit": _preset("6bitg16", 6),
    "4bit": _preset("4bitg16", 4),
    "3bit": _preset("3bitg16", 3),
    "2bit": _preset("2bitg16", 2),
    "4bit-per-tensor": _preset("4bit-per-tensor", 4, 0),
    "4bit-int8": _preset("4bit-int8", 4, lut_dtype="int8"),
    "3bit-int8": _preset("3bit-int8", 3, lut_dtype="int8"),
    "3bit-int4": _preset("3bit-int4", 3, lut_dtype="int4"),
    "2bit-int4": _preset("2bit-int4", 2, lut_dtype="int4"),
    "dense": Recipe(name="dense", rules=(Rule(match="*", skip=True),)),
}


def load_recipe(reference: str | Path) -> Recipe:
    """A preset by its name, or a YAML file.

    Raises:
        RecipeError: unknown preset, unreadable file, or a field that is wrong; the message names it.
    """
    if isinstance(reference, str) and reference in PRESETS:
        return PRESETS[reference]
    path = Path(reference)
    if not path.is_file():
        raise RecipeError(
            f"{reference}: no such recipe file, and no preset; presets are {', '.join(PRESETS)}."
        )
    try:
        contents = load_yaml(read_regular(path).decode("utf-8"))
        return Recipe.model_validate(contents)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}).") from error
    except YamlError as error:
        raise RecipeError(f"{path}: is not valid YAML: {error}.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text ({error}).") from error
    except pydantic.ValidationError as error:
        raise RecipeError(f"{path}: {_explain(error)}") from error


def _explain(error: pydantic.ValidationError) -> str:
    lines = []
    for detail in error.errors():
        where = ".".join(str(part) for part in detail["loc"]) or "recipe"
        lines.append(f"{where}: {detail['msg'].removeprefix('Value error, ')} (found {detail['input']!r})")
    return "; ".join(lines)[:800] + "."
