"""Stand-ins for palettized weights, so that converting a model never holds its dense weights.

A conversion only moves weights: their values are put in at its end, from the palettes. What is traced in their
place is one column of numbers, seen as a whole matrix. It differs from row to row, so that a pass which transposes,
scales or folds a weight is noticed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edkm_export.checkpoint import Checkpoint
from edkm_export.decoder.build import empty_decoder
from edkm_export.decoder.decoder import Decoder
from edkm_export.decoder.embedding.embedding_model import EmbeddingModel, empty_embedding_model

__all__ = ["decoder_of_stand_ins", "embedding_model_of_stand_ins", "stand_in"]

_PERIOD = 509  # a prime, so that no group or kernel size repeats with it; each value is exact in float16


def stand_in(shape: Sequence[int]) -> Tensor:
    """A weight that takes the memory of one column: float32 `shape`."""
    column = 1 + torch.arange(shape[0]) % _PERIOD / 512
    return column.view(-1, *(1 for _ in shape[1:])).expand(*shape)


@torch.no_grad()
def decoder_of_stand_ins(checkpoint: Checkpoint) -> Decoder:
    """The decoder of a checkpoint with stand-ins for its palettized weights; the others are its own, float32.

    Raises:
        ConversionError, CheckpointError: see `empty_decoder`.
    """
    decoder = empty_decoder(checkpoint)
    decoder.load_state_dict(_state(checkpoint), assign=True)
    decoder.tie()
    return decoder.eval().requires_grad_(False)


@torch.no_grad()
def embedding_model_of_stand_ins(checkpoint: Checkpoint) -> EmbeddingModel:
    """The same of an embedding model.

    Raises:
        ConversionError, CheckpointError: see `empty_embedding_model`.
    """
    model = empty_embedding_model(checkpoint)
    model.load_state_dict(_state(checkpoint), assign=True)
    return model.eval().requires_grad_(False)


def _state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    state = {name: stand_in(tensor.shape) for name, tensor in checkpoint.palettized.items()}
    state |= {name: tensor.float() for name, tensor in checkpoint.dense.items()}
    return state | {name: state[target] for name, target in checkpoint.tied.items()}
