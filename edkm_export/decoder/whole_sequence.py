"""A decoder over whole texts of one length, without a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edkm_export.decoder.config import FULL, LINEAR, SLIDING
from edkm_export.decoder.context import Context, causal_mask, sliding_mask
from edkm_export.decoder.decoder import Decoder
from edkm_export.decoder.delta_rule import CHUNK, TriangleBuffers
from edkm_export.decoder.positions import PositionTables

__all__ = ["WholeSequence"]


class WholeSequence(nn.Module):
    """A decoder over a fixed number of positions, its tables and causal masks held as constants.

    A shorter text is padded on the right: no position attends to what follows it.

    Args:
        decoder: the model.
        hf_config: Hugging Face configuration, for the position tables.
        length: number of positions.

    Raises:
        ConversionError: see `PositionTables`.
    """

    positions: Tensor

    def __init__(self, decoder: Decoder, hf_config: dict[str, Any], length: int) -> None:
        super().__init__()
        self.decoder = decoder
        positions = torch.arange(length)[None]
        self.register_buffer("positions", positions.int(), persistent=False)
        self.rotary: list[str] = []
        for kind, (cos, sin) in PositionTables(decoder.config, hf_config, length)(positions).items():
            self.rotary.append(kind)
            # Copies, since a trace takes no tensor under two names; a converter merges equal constants again.
            self.register_buffer(f"cos_{kind}", cos.clone(), persistent=False)
            self.register_buffer(f"sin_{kind}", sin.clone(), persistent=False)
        causal = causal_mask(positions, positions)
        masks = {FULL: causal}
        if decoder.config.sliding_window is not None:
            masks[SLIDING] = sliding_mask(causal, positions, positions, decoder.config.sliding_window)
        for kind in decoder.config.attention_kinds():
            self.register_buffer(f"mask_{kind}", masks[kind], persistent=False)
        self.triangle = None
        if LINEAR in decoder.config.layer_kinds:
            self.triangle = TriangleBuffers(min(length, CHUNK))

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids int [1, length] -> logits [1, length, vocab_size]."""
        # Learned positions must be looked up by the program: a constant result would hide the table's name.
        position_ids = self.positions + input_ids * 0
        rotary = {k: (self.get_buffer(f"cos_{k}"), self.get_buffer(f"sin_{k}")) for k in self.rotary}
        masks = {k: self.get_buffer(f"mask_{k}") for k in self.decoder.config.attention_kinds()}
        triangle = None if self.triangle is None else self.triangle.masks()
        context = Context(position_ids, rotary, masks, triangle=triangle)
        return self.decoder(input_ids, context)  # type: ignore[no-any-return]
