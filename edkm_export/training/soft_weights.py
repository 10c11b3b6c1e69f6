"""The soft weights of a finished run, computed again from the last state that it left on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor

from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import InputError
from edkm_export.palette import PalettizedTensor
from edkm_export.recipe import Recipe
from edkm_export.reference.soft_model import SoftWeights
from edkm_export.training import run_checkpoints
from edkm_export.training.palettized.clusters import Backward, ClusterMethod, Clusters
from edkm_export.training.run_folder import RunFolder
from edkm_export.training.run_weights import read_weights
from edkm_export.training.train_config import TrainConfig

__all__ = ["read_soft_weights"]

_USED: dict[Backward, str] = {
    "dkm": "the forward passes of training used them",
    "soft": "a by-product: training ran forward with the hard weights, and used these in the backward pass only",
    "straight-through": "a by-product: training ran forward with the hard weights, straight through",
}


def read_soft_weights(run: str | Path, checkpoint: Checkpoint) -> SoftWeights:
    """Find the state of a run that a checkpoint was made from.

    The soft weight is what the forward pass of one more step with "dkm" would use. A run that was straight-through set
    no temperature; there it is that of the trained clusters.

    Args:
        run: folder of `edkm-export train`.
        checkpoint: that it wrote.

    Returns:
        Yields the weights one by one, and raises InputError at one that is not what was shipped.

    Raises:
        InputError: the state is gone, damaged or of another step, or nothing in it has a soft form.
    """
    run = Path(run)
    config, recipe, step = _settings(checkpoint)
    state = _read_state(run, config, recipe, step, checkpoint)
    soft = {
        name: tensor for name, tensor in checkpoint.palettized.items() if state.is_soft(name, tensor.n_bits)
    }
    if not soft:
        raise InputError(
            f"{run}: trained no weight with a LUT of 16 entries or less; larger ones are straight-through, and "
            "there is no soft model."
        )

    @torch.no_grad()
    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in soft.items():
            yield name, state.soft_weight(name, tensor)

    passes = "1 iteration" if config.iterations == 1 else f"{config.iterations} iterations"
    return SoftWeights(
        f"{len(soft)} of {len(checkpoint.palettized)} weights by soft k-means ({passes}, alpha {config.alpha:g}) of "
        f"the master weights of step {step}; {_USED[config.backward]}",
        weights,
    )


@dataclass(frozen=True)
class _State:
    """What a run left on disk.

    Attributes:
        path: one of its checkpoints.
        tensors: of the student, by name in its state dict.
        config: settings of the run.
        recipe: what it was palettized with.
    """

    path: Path
    tensors: Mapping[str, Any]
    config: TrainConfig
    recipe: Recipe

    @property
    def method(self) -> ClusterMethod:
        """How the soft weight is made; "soft" also sets a temperature."""
        backward: Backward = "dkm" if self.config.backward == "dkm" else "soft"
        return ClusterMethod(backward, self.config.alpha, self.config.iterations)

    def is_soft(self, name: str, n_bits: int) -> bool:
        """Whether a weight was trained, and with a LUT that softness is for."""
        method = self.method
        return _part(name, "weight") in self.tensors and method.suited(1 << n_bits) == method

    def soft_weight(self, name: str, shipped: PalettizedTensor) -> Tensor:
        """The soft weight of a parameter, float32 in the shape that checkpoints hold it in."""
        groups, k = shipped.groups[0], 1 << shipped.n_bits
        shapes = {
            "weight": tuple(shipped.shape),
            "lut": (groups, k),
            "unit": (groups, 1),
            "indices": (groups, shipped.numel // groups),
            "temperature": (groups,),
        }
        held: dict[str, Tensor] = {}
        for part, shape in shapes.items():
            tensor = self.tensors.get(_part(name, part))
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
                raise self._misfit(name)
            held[part] = tensor
        rule = self.recipe.rule_for(name.removesuffix(".weight"))  # int8 entries do not tell an int4 grid
        if rule is None:
            raise self._misfit(name)
        centroids = held["lut"] * held["unit"]
        clusters = Clusters(held["weight"], centroids, rule, self.method, in_bfloat16=self.config.bf16)
        for part in ("lut", "unit", "indices"):
            getattr(clusters, part).data.copy_(held[part])
        if self.config.backward != "straight-through":
            clusters.temperature.copy_(held["temperature"])
        clusters.restored()
        if not clusters.export(name).same_bits(shipped):
            raise self._misfit(name)
        return clusters.soft_weight(clusters.weight, clusters.centroids()).view(clusters.weight.shape)

    def _misfit(self, name: str) -> InputError:
        return InputError(f"{self.path}: its {name} is not the one that was shipped; it is of another run.")


def _part(name: str, part: str) -> str:
    return f"{name.removesuffix('.weight')}.clusters.{part}"


def _settings(checkpoint: Checkpoint) -> tuple[TrainConfig, Recipe, int]:
    """Settings, recipe and last step of the run that wrote a checkpoint."""
    stored = checkpoint.provenance.get("training")
    if not isinstance(stored, dict):
        raise InputError(f"{checkpoint.path}: was palettized in one shot; there is no soft model.")
    known = {key: value for key, value in stored.items() if key in TrainConfig.model_fields}
    try:
        recipe = Recipe.model_validate(checkpoint.recipe)
        return TrainConfig.model_validate(known), recipe, int(stored["trained_steps"])
    except (pydantic.ValidationError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{checkpoint.path}: does not say how it was trained.") from error


def _read_state(run: Path, config: TrainConfig, recipe: Recipe, step: int, checkpoint: Checkpoint) -> _State:
    path = run_checkpoints.last_complete(RunFolder(run).checkpoints)
    if path is None:
        why = (
            "was trained with --save-every 0" if config.save_every == 0 else "holds no checkpoints of the run"
        )
        raise InputError(f"{run}: {why}; without its last state there is no soft model.")
    try:
        found = run_checkpoints.read_mark(path).step
        tensors = read_weights(path)
    except Exception as error:  # what damaged files raise has no common base
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())[:120]}).") from error
    if found != step:
        raise InputError(f"{path}: is of step {found}, and {checkpoint.path} of step {step}.")
    if not isinstance(tensors, Mapping):
        raise InputError(f"{path}: {run_checkpoints.WEIGHTS} holds no weights.")
    return _State(path, tensors, config, recipe)
