"""Bits for each weight of a language model that is palettized in one shot."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from edkm_export.recipe import Recipe
from edkm_export.reference.conv1d import held_weight
from edkm_export.reference.streamed_model import device_of
from edkm_export.text import in_windows
from edkm_export.training.bit_budget import BitBudget, BitPlan, BitTarget
from edkm_export.training.first_centroids import Seeding
from edkm_export.training.sensitivity import fisher_factors

__all__ = ["choose_bits"]

_CONTEXT = (
    256  # tokens of a window: gradients keep the activations of all layers, and those of attention squared
)


def choose_bits(
    model: Any,
    shapes: Mapping[str, tuple[int, ...]],
    recipe: Recipe,
    target: BitTarget,
    windows: Tensor,
    *,
    source: str,
) -> tuple[BitPlan, dict[str, Tensor]]:
    """Measure on a text which weights matter, and give them bits.

    Args:
        model: a causal language model of transformers, whole in memory, in any float dtype.
        shapes: {module name: weight shape} of what can be palettized.
        recipe: see `BitBudget.of`.
        target: the average.
        windows: int64 [windows, context].
        source: name of the model, for messages.

    Returns:
        What was chosen, and what an error of each row of embedding and output head costs: {module name: float32
        [in, in]}.

    Raises:
        InputError: the target cannot be met, or an activation is not finite.
    """
    ids = windows.to(device_of(model))
    with _frozen(model):
        parts = in_windows(ids.flatten(), min(_CONTEXT, ids.shape[1]))
        importance = fisher_factors(model, parts, vocabulary=True)
        seeding = Seeding(lambda name: held_weight(model.get_submodule(name)), source=source)
        plan = BitBudget.of(model, shapes, recipe, target, source=source).spend(importance, seeding)
    costs = {name: importance[name].row_cost() for name in plan.outer if name in importance}
    return plan, {name: cost for name, cost in costs.items() if cost is not None}


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter takes a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
