"""Weights of a training checkpoint: master weights, LUTs and indices. Frozen masters come from the original again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from edkm_export.errors import TrainingError
from edkm_export.limits import is_out_of_memory
from edkm_export.torch_archive import UnsafeArchiveError, load_archive
from edkm_export.training import run_checkpoints
from edkm_export.training.palettized.surgery import clusters_of

__all__ = ["frozen_masters", "load_weights", "read_state_dict", "read_weights", "save_weights"]


def save_weights(model: Any, folder: Path) -> None:
    """Write the state of a palettized model, whole, into an existing folder."""
    frozen = frozen_masters(model)
    whole = model.state_dict()
    torch.save(
        {name: value for name, value in whole.items() if name not in frozen}, folder / run_checkpoints.WEIGHTS
    )


def read_state_dict(path: Path) -> Any:
    """Tensors of a file, mapped; nothing is unpickled."""
    return load_archive(path)


def read_weights(folder: Path) -> Any:
    """Tensors that `save_weights` wrote, by name; those of older versions under today's names."""
    state = read_state_dict(folder / run_checkpoints.WEIGHTS)
    if not isinstance(state, Mapping):
        return state
    return {_today(name): tensor for name, tensor in state.items()}


def _today(name: Any) -> Any:
    """Checkpoints of earlier runs call indices codes."""
    old = ".clusters.codes"
    return (
        f"{name.removesuffix(old)}.clusters.indices" if isinstance(name, str) and name.endswith(old) else name
    )


def load_weights(model: Any, folder: Path) -> None:
    """Load what `save_weights` wrote.

    Raises:
        TrainingError: it belongs to another model or recipe.
    """
    try:
        missing, unknown = model.load_state_dict(read_weights(folder), strict=False)
    except (RuntimeError, TypeError, AttributeError, UnsafeArchiveError) as error:
        if is_out_of_memory(error):
            raise
        raise TrainingError(
            f"{folder}: does not fit the model ({' '.join(str(error).split())[:200]})."
        ) from error
    excused = frozen_masters(model)
    lost = [name for name in missing if name not in excused]
    if lost or unknown:
        raise TrainingError(f"{folder}: does not fit the model: {', '.join((lost + list(unknown))[:4])}.")
    for clusters in clusters_of(model).values():
        clusters.restored()


def frozen_masters(model: Any) -> set[str]:
    """State dict names of master weights that are not trained, under each name of tied ones."""
    return {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name.endswith(".clusters.weight") and not parameter.requires_grad
    }
