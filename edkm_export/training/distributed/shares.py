"""Models that are cut into shares while they are read: a layer is whole in a process only until it is cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from edkm_export.recipe import Recipe
from edkm_export.reference.float_weights import FloatWeights
from edkm_export.training.distributed.processes import Processes
from edkm_export.training.distributed.sharded_clusters import ShardedClusters
from edkm_export.training.learner import hold_in_bfloat16
from edkm_export.training.optimizer import freeze, sizes_of
from edkm_export.training.palettized.surgery import (
    clusters_of,
    palettize_layers,
    replace_clusters,
    trainable_shapes,
)
from edkm_export.training.preparation import method_of
from edkm_export.training.train_config import TrainConfig

__all__ = ["Shares", "decoder_layers"]


def decoder_layers(model: Any) -> Iterator[nn.Module]:
    """The decoder's layers: what transformers keeps on one device when it spreads a model."""
    names = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in names:
            yield module


class Shares:
    """Builds models of which each process holds a share of the rows.

    FSDP2 gathers a layer before its use and frees it afterwards; of a palettized weight it gathers the indices only
    (`gathered`).
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.mesh = init_device_mesh(processes.device.partition(":")[0], (processes.count,))

    def frozen(self, weights: FloatWeights, *, in_bfloat16: bool) -> Any:
        """A model that is not trained, with its layers' matrices cut. Called as it always was, it gathers by itself.

        Its embedding, head and norms stay whole. A collective.

        Args:
            weights: of the model.
            in_bfloat16: round the matrices of its linear layers, see `hold_in_bfloat16`.
        """
        device = self.processes.device
        model = weights.outline(device)
        for layer in decoder_layers(model):
            weights.fill(model, layer, device)
            if in_bfloat16:
                hold_in_bfloat16(model, layer)
            whole = {parameter for parameter in layer.parameters() if parameter.dim() < 2}
            fully_shard(layer, mesh=self.mesh, ignored_params=whole)
        weights.fill(model, model, device)
        left = {parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)}
        if in_bfloat16:
            hold_in_bfloat16(model)
        fully_shard(model.base_model, mesh=self.mesh, ignored_params=left)
        return model

    def student(
        self,
        weights: FloatWeights,
        recipe: Recipe,
        config: TrainConfig,
        seeds: Mapping[tuple[str, int], Tensor] | None,
    ) -> tuple[Any, dict[str, float]]:
        """A palettized model whose layers are cut; what is outside of them is left to `Sharding`. A collective.

        Args:
            weights: of the float model.
            recipe: bits, groups and LUT dtype by module name.
            config: settings.
            seeds: first centroids of every weight; None: LUTs and indices are to be loaded from a checkpoint.

        Returns:
            The model, and the root mean square of each trained parameter by its name, taken while it was whole.

        Raises:
            RecipeError, PaletteError, InputError: the recipe does not fit, a weight is not finite, or it has fewer rows
                than there are processes.
        """
        device = self.processes.device
        model = weights.outline(device)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        plan = dict(recipe.plan(trainable_shapes(model), weights.reference))
        names = {id(module): name for name, module in model.named_modules()}
        sizes: dict[str, float] = {}
        for part in (*decoder_layers(model), model):
            weights.fill(model, part, device)
            inside = f"{names[id(part)]}." if part is not model else ""
            own = {name: plan.pop(name) for name in list(plan) if name.startswith(inside)}
            palettize_layers(
                model,
                own,
                method=method_of(config),
                seeds=seeds,
                seeded=seeds is not None,
                in_bfloat16=config.bf16,
                source=weights.reference,
            )
            freeze(model, config)
            sizes |= sizes_of(model, sizes)
            made = {
                clusters: ShardedClusters(clusters, name, self.processes)
                for name, clusters in clusters_of(model).items()
                if not isinstance(clusters, ShardedClusters)
            }
            replace_clusters(model, made)
            if part is not model:
                fully_shard(part, mesh=self.mesh, ignored_params={each.lut for each in made.values()})
        return model, sizes
