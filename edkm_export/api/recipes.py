"""Which recipe a caller means: one of their own, or bits and groups that fit the module."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from edkm_export.errors import RecipeError
from edkm_export.lut_dtypes import LutDtype
from edkm_export.recipe import Recipe, Rule, load_recipe, uniform_recipe

__all__ = ["DEFAULT_BITS", "GivenRecipe", "choose_recipe", "fitted_recipe"]

GivenRecipe = Recipe | str | Path | Mapping[str, Any]
"""A recipe, the name of a preset, a YAML file, or the contents of one."""

DEFAULT_BITS, _GROUP = 4, 16
# What an encoder looks up at positions that are known when it is converted: the converter folds it into a constant.
_FOLDED = ("*position_embeddings", "*token_type_embeddings", "*embed_positions")


def choose_recipe(
    recipe: GivenRecipe | None,
    bits: int | None,
    group_size: int | None,
    lut_dtype: LutDtype | None,
    *,
    default_bits: int = DEFAULT_BITS,
) -> Recipe:
    """The recipe of a caller, or the uniform one of bits, group size and LUT dtype; without bits those of the default.

    Raises:
        RecipeError: it is malformed, or both were given.
    """
    if recipe is None:
        return uniform_recipe(
            default_bits if bits is None else bits,
            _GROUP if group_size is None else group_size,
            lut_dtype or "float16",
            fit_groups=group_size is None,
        )
    if bits is not None or group_size is not None or lut_dtype is not None:
        raise RecipeError("recipe decides bits, group_size and lut_dtype; leave these out.")
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, (str, Path)):
        return load_recipe(recipe)
    try:
        return Recipe.model_validate(recipe)
    except pydantic.ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"])) or "recipe"
        message = detail["msg"].removeprefix("Value error, ")
        raise RecipeError(f"{where}: {message} (found {detail['input']!r:.80}).") from error


def fitted_recipe(
    shapes: Mapping[str, Sequence[int]],
    bits: int | None,
    group_size: int | None,
    lut_dtype: LutDtype | None,
    skip: Iterable[str] = (),
) -> Recipe:
    """The uniform recipe for a module of any sizes.

    Args:
        shapes: {module name: (out, in, ...)} of every weight that can be palettized.
        bits: of an index; None: 4.
        group_size: output rows that share a LUT; None: 16, or the nearest number that divides the rows.
        lut_dtype: None: float16.
        skip: shell patterns of the names of modules that stay dense.

    Raises:
        RecipeError: bits, group size or LUT dtype are not supported, or a pattern matches nothing.
    """
    base = uniform_recipe(
        DEFAULT_BITS if bits is None else bits,
        _GROUP if group_size is None else group_size,
        lut_dtype or "float16",
        fit_groups=group_size is None,
    )
    skipped = [Rule(match=pattern, skip=True) for pattern in skip]
    skipped += [Rule(match=pattern, skip=True, optional=True) for pattern in _FOLDED]
    inner = base.rules[-1].model_copy(update={"optional": True})
    rules = (*skipped, *base.rules[:-1], inner)
    used = [rule for rule in rules if not rule.optional or fnmatch.filter(shapes, rule.match)]
    return base.model_copy(update={"rules": tuple(used)})
