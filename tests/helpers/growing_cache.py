"""A cache for decoders that are run in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


class GrowingCache:
    """Keys and values of all earlier positions."""

    def __init__(self, layers: int) -> None:
        self.kept: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        before = self.kept[layer]
        if before is not None:
            keys, values = torch.cat((before[0], keys), 2), torch.cat((before[1], values), 2)
        self.kept[layer] = (keys, values)
        return keys, values
