"""Dense autograd: the paper's equations as they stand. The oracle, not for use at scale."""

from __future__ import annotations

import torch
from torch import Tensor

from edkm_export.clustering.recurrence import least_mass

__all__ = ["cluster_dense"]


def cluster_dense(weight: Tensor, centroids: Tensor, tau: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Differentiable k-means (DKM, arXiv 2108.12659, section 3.2; eDKM, arXiv 2309.00964, section 2).

    Attention has `k` entries a weight, and autograd saves several tensors of that size an iteration.

    Args:
        weight: [groups, m, dim].
        centroids: [groups, k, dim], same dtype.
        tau: [groups], same dtype.
        iterations: T, at least 1.

    Returns:
        Soft weight [groups, m, dim] and centroids c^T [groups, k, dim].
    """
    for _ in range(iterations):
        distance = weight[:, :, None, 0] - centroids[:, None, :, 0]  # [groups, m, k]
        distance = distance**2
        for axis in range(1, weight.shape[2]):
            distance = distance + (weight[:, :, None, axis] - centroids[:, None, :, axis]) ** 2
        attention = torch.softmax(-distance / tau[:, None, None], dim=2)
        mass = attention.sum(1)[..., None]  # [groups, k, 1]
        moment = attention.transpose(1, 2) @ weight
        alive = mass > least_mass(mass.dtype)
        centroids = torch.where(alive, moment / torch.where(alive, mass, 1.0), centroids)
    return attention @ centroids, centroids
