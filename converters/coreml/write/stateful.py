"""The interface of swift-transformers: prompts and single tokens of any length, keys and values in states.

The contract is that of `LanguageModelWithStatefulKVCache` in huggingface/swift-transformers
(Sources/Models/LanguageModel.swift): `inputIds` with a ranged length, `fullAttentionMask` over all positions so far,
states `keyCache` and `valueCache`, `logits` of rank 3. Its older masks (`attentionMask`, `causalMask`) are all zeros
and would let a prompt see its own future.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from converters.coreml.backend import load_coremltools
from converters.coreml.format import MASK, TOKENS
from converters.coreml.write.state_cache import StateCache, StateLayout
from edkm_export.decoder.config import FULL, SLIDING
from edkm_export.decoder.context import MASKED, Context, sliding_mask
from edkm_export.decoder.decoder import Decoder
from edkm_export.decoder.delta_rule import Triangle
from edkm_export.decoder.positions import PositionTables
from edkm_export.decoder.states import Recurrence

__all__ = ["Stateful", "example_inputs", "input_types"]


class Stateful(nn.Module):
    """A decoder with its cache; the shapes of the inputs tell where the new tokens stand.

    With linear attention all new tokens are one chunk, whose work grows with the third power of their number: there is
    no operation for a number of chunks that is left open. Long prompts are better fed in pieces.

    Args:
        decoder: the model.
        hf_config: Hugging Face configuration, for the position tables.
        context: most positions that the cache holds.

    Raises:
        ConversionError: see `PositionTables`.
    """

    def __init__(self, decoder: Decoder, hf_config: dict[str, Any], context: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.tables = PositionTables(decoder.config, hf_config, context)
        self.layout = StateLayout.of(decoder.config, context)
        self.layout.add_to(self)

    def forward(self, inputIds: Tensor, fullAttentionMask: Tensor) -> Tensor:
        """Logits of the new tokens.

        Args:
            inputIds: int [1, new].
            fullAttentionMask: additive float [1, 1, new, total]; the new tokens are the last of `total` positions.

        Returns:
            float [1, new, vocab_size].
        """
        end = fullAttentionMask.shape[-1]
        begin = end - inputIds.shape[-1]
        positions = torch.arange(begin, end)[None]
        masks = {FULL: fullAttentionMask.clamp(min=MASKED)}  # -65504 plus a score could leave float16
        window = self.decoder.config.sliding_window
        if window is not None and SLIDING in self.decoder.config.layer_kinds:
            masks[SLIDING] = sliding_mask(masks[FULL], positions, torch.arange(end)[None], window)
        triangle = None
        if self.layout.places[Recurrence]:
            triangle = Triangle.open(inputIds.shape[-1], self.tables.length)
        context = Context(positions, self.tables(positions), masks, triangle=triangle)
        cache = StateCache(self, self.layout, self.decoder.config, begin, end, visible=end)
        return self.decoder(inputIds, context, cache)  # type: ignore[no-any-return]


def example_inputs() -> tuple[Tensor, Tensor]:
    """Inputs to trace with: two new tokens after three."""
    return torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 5)


def input_types(context: int) -> list[Any]:
    """`coremltools.TensorType` of the inputs."""
    ct = load_coremltools()
    import numpy as np

    new = ct.RangeDim(1, context, default=1)
    total = ct.RangeDim(1, context, default=1)
    return [
        ct.TensorType(TOKENS, (1, new), dtype=np.int32),
        ct.TensorType(MASK, (1, 1, new, total), dtype=np.float16),
    ]
