"""Soft PyTorch: the Hugging Face model with the soft weights of a training run, before they were rounded to LUTs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edkm_export.checkpoint import Checkpoint
from edkm_export.reference.conv1d import conv1d_weights
from edkm_export.reference.hard_model import load_hard_model

__all__ = ["SoftWeights", "load_soft_model"]


@dataclass(frozen=True)
class SoftWeights:
    """Palettized weights as soft k-means of their master weights gives them.

    Attributes:
        how: where they are from, in words.
        weights: yields parameter names of a checkpoint and values, float32 [out, in, ...], one after the other.
            Weights that it leaves out are as they ship.
    """

    how: str
    weights: Callable[[], Iterator[tuple[str, Tensor]]]


@torch.no_grad()
def load_soft_model(checkpoint: Checkpoint, soft: SoftWeights) -> Any:
    """Build the model, as `load_hard_model` does; everything that is not palettized comes from the checkpoint."""
    model = load_hard_model(checkpoint)
    turned = conv1d_weights(model)
    for name, weight in soft.weights():
        model.get_parameter(name).copy_(weight.t() if name in turned else weight)
    return model
