"""A temperature that does not depend on the scale of the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from edkm_export.clustering.seeding import optimal_centroids
from edkm_export.errors import PaletteError

__all__ = ["scale_free_temperature"]

# Groups that k centroids represent exactly have J = 0; this share of their mean square stands in for it, and
# the assignment is as good as hard.
_LEAST_SHARE = 2.0**-40


def scale_free_temperature(
    weight: Tensor,
    k: int,
    *,
    alpha: float = 1.0,
    importance: Tensor | None = None,
    error: Tensor | None = None,
) -> Tensor:
    """Temperature tau = alpha * J, with J the error per weight of the optimal k centroids of that group.

    Multiplying the weights by s multiplies J, like squared distances, by s**2, so that attention stays as it
    was. An absolute tau that suits one scale of weights merges the centroids of another.

    Args:
        weight: float [groups, m], or vectors [groups, m, dim] if `error` is given.
        k: centroids in a group.
        alpha: softness, positive: at 1 to 2 neighbouring centroids share a weight between them visibly.
        importance: as for `optimal_centroids`.
        error: squared error of the centroids, float [groups], weighted by `importance`, if it is known
            already: the second result of `optimal_centroids`.

    Returns:
        float64 [groups], positive.

    Raises:
        PaletteError: alpha is not positive, shapes do not fit, or the weight is not finite.
    """
    if not 0 < alpha < torch.inf:
        raise PaletteError(f"alpha is {alpha}, expected a positive number.")
    if error is None:
        _, error = optimal_centroids(weight, k, importance=importance)
    if error.shape != weight.shape[:1]:
        raise PaletteError(f"error has shape {list(error.shape)}, expected [{weight.shape[0]}].")
    groups, m = weight.shape[:2]
    mass = torch.full((groups,), float(m), dtype=torch.float64, device=weight.device)
    if importance is not None:
        total = importance.detach().double().expand(groups, m).sum(1)
        mass = torch.where(total > 0, total, mass)
    square = torch.linalg.vector_norm(weight.detach().flatten(1), dim=1, dtype=torch.float64).square() / m
    floor = torch.where(square > 0, square * _LEAST_SHARE, 1.0)  # a group of zeros is content with any tau
    return alpha * torch.maximum(error.double() / mass, floor)
