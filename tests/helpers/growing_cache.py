"""A cache for decoders that are run in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from edkm_export.decoder.config import DecoderConfig
from edkm_export.decoder.states import Columns, KeysValues, Recurrence, layer_states


class GrowingCache:
    """The states of all layers."""

    def __init__(self, config: DecoderConfig, batch: int = 1) -> None:
        self.kept: list[dict[type, Tensor]] = []
        for layer in range(config.num_layers):
            states: dict[type, Tensor] = {}
            for state in layer_states(config, layer):
                if isinstance(state, KeysValues):
                    states[KeysValues] = torch.zeros(2, batch, state.heads, 0, state.head_dim)
                elif isinstance(state, Columns):
                    states[Columns] = torch.zeros(batch, state.channels, state.width)
                else:
                    states[Recurrence] = torch.zeros(batch, state.heads, state.key_dim, state.value_dim)
            self.kept.append(states)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.kept[layer]
        kept[KeysValues] = torch.cat((kept[KeysValues], torch.stack((keys, values))), 3)
        return kept[KeysValues][0], kept[KeysValues][1]

    def extend(self, layer: int, columns: Tensor) -> Tensor:
        kept = self.kept[layer]
        width = kept[Columns].shape[-1]
        both = torch.cat((kept[Columns], columns), -1)
        kept[Columns] = both[..., -width:]
        return both

    def matrices(self, layer: int) -> Tensor:
        return self.kept[layer][Recurrence]

    def keep(self, layer: int, matrices: Tensor) -> None:
        self.kept[layer][Recurrence] = matrices
