"""eDKM as a training strategy of coreai-opt, Apple's library for compressing models.

coreai-opt palettizes with one-shot k-means and leaves palettized weights as they are while it trains. With this
strategy they learn. It finds us by the entry point group `coreai_opt.plugins`; a specification then names it:

    PalettizationSpec(n_bits=2, granularity=..., training_strategy_spec={"type": "edkm", "method": "soft"})
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from edkm_export.clustering import hard_assign, optimal_centroids, scale_free_temperature, soft_cluster
from edkm_export.errors import BackendMissingError, PaletteError

__all__ = ["Method", "register", "train_weight"]

Method = Literal["straight-through", "soft", "dkm"]
"""straight-through: the forward pass sees the palette, gradients pass as if it were the weight. soft: the same forward
pass, gradients of soft clustering. dkm: the forward pass sees softly clustered weights, too (arXiv 2108.12659)."""

_STATE = "_edkm_seeded"


def train_weight(
    groups: Tensor, centroids: Tensor, *, method: Method, alpha: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """One forward pass of a weight that is palettized while it is trained.

    Args:
        groups: float [groups, m], each row shares a LUT; gradients reach it.
        centroids: float [groups, k].
        method: see `Method`.
        alpha: temperature, as a multiple of the clusters' own error.
        iterations: of soft clustering.

    Returns:
        What the forward pass sees, [groups, m]; and the next centroids, [groups, k], values of float16.
    """
    weight = groups.detach()
    hard = centroids.gather(1, hard_assign(weight, centroids).long())
    if method == "straight-through":
        moved = _means(weight, centroids)
        return groups + (hard - weight), _on_grid(moved)
    error = (weight - hard).double().square().sum(1)
    temperature = scale_free_temperature(weight, centroids.shape[1], alpha=alpha, error=error)
    soft, moved = soft_cluster(groups, centroids.float(), temperature=temperature, iterations=iterations)
    if method == "soft":
        soft = soft + (hard - soft).detach()
    return soft.to(groups.dtype), _on_grid(moved.detach())


def _means(weight: Tensor, centroids: Tensor) -> Tensor:
    """The mean of the weights of each centroid; one without weights stays where it is."""
    indices = hard_assign(weight, centroids).long()
    total = torch.zeros_like(centroids, dtype=torch.float64).scatter_add_(1, indices, weight.double())
    count = torch.zeros_like(total).scatter_add_(1, indices, torch.ones_like(weight, dtype=torch.float64))
    return torch.where(count > 0, total / count.clamp_min(1), centroids.double()).to(centroids.dtype)


def _on_grid(centroids: Tensor) -> Tensor:
    """Rounded to what a float16 LUT holds: what is trained is what ships."""
    return centroids.half().to(centroids.dtype)


def register() -> None:
    """Make the strategy known to coreai-opt; called by its plugin loader.

    Raises:
        BackendMissingError: coreai-opt is not installed.
    """
    try:
        from coreai_opt.palettization.spec.training_strategy import TrainingStrategy, TrainingStrategySpec
    except ImportError as error:
        raise BackendMissingError("the strategy needs coreai-opt: pip install coreai-opt==0.4.0") from error
    if "edkm" in TrainingStrategySpec.REGISTRY:
        return

    class EDKM(TrainingStrategy):  # type: ignore[misc,unused-ignore]
        """See `Method`."""

        def __init__(self, method: Method, alpha: float, iterations: int) -> None:
            self.method, self.alpha, self.iterations = method, alpha, iterations

        def train_forward(self, module: Any, weight: Tensor) -> Tensor:
            """What the training pass sees in the place of `weight`, of the same shape."""
            if module.cluster_dim != 1:
                raise PaletteError(
                    f"the edkm strategy clusters scalars, cluster_dim is {module.cluster_dim}."
                )
            # no public way to a module's groups
            axis = module._resolved_axis
            flat = module.reshape_strategy.reshape_for_kmeans(weight, axis)
            blocks = module._split_into_groups(flat, axis)
            groups = blocks.reshape(blocks.shape[0], -1)
            if not getattr(module, _STATE, False):
                seeds, _ = optimal_centroids(groups.detach(), 1 << module.n_bits)
                module.centroids = _on_grid(seeds.to(groups)).unsqueeze(-1)
                setattr(module, _STATE, True)
            seen, centroids = train_weight(
                groups,
                module.centroids.squeeze(-1).to(groups),
                method=self.method,
                alpha=self.alpha,
                iterations=self.iterations,
            )
            module.centroids, module._indices_stale = centroids.unsqueeze(-1), True
            merged = module._merge_groups(seen.reshape(blocks.shape), axis)
            shaped: Tensor = module.reshape_strategy.reshape_to_original(merged, axis, weight.shape)
            return shaped

    class EDKMSpec(TrainingStrategySpec):  # type: ignore[misc,unused-ignore]
        """Settings, with the defaults of `edkm-export train` for 3 bits and more."""

        method: Method = "soft"
        alpha: float = 1.0
        iterations: int = 1
        _strategy_cls = EDKM

    TrainingStrategySpec.register("edkm")(EDKMSpec)
