"""Position tables of a decoder, as constants."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edkm_export.decoder.config import DecoderConfig
from edkm_export.decoder.rope import rope_tables
from edkm_export.errors import ConversionError

__all__ = ["PositionTables"]


class PositionTables(nn.Module):
    """Cosines and sines of `length` positions for each kind of layer that the model has.

    Kinds whose tables are equal share them. A model with learned positions has none.

    Args:
        decoder_config: of the decoder.
        hf_config: Hugging Face configuration with `rope_parameters`.
        length: number of positions, from 0.
        layers: which layers need them; the default: all.

    Raises:
        ConversionError: constant tables of this length cannot hold the model's positions.
    """

    def __init__(
        self,
        decoder_config: DecoderConfig,
        hf_config: dict[str, Any],
        length: int,
        layers: slice = slice(None),
    ) -> None:
        super().__init__()
        self.length = length
        self.tables: dict[str, str] = {}  # kind of layer -> the kind whose table it uses
        if decoder_config.names.positions is not None and length > decoder_config.max_positions:
            raise ConversionError(
                f"{length} positions were asked for, but the model has learned {decoder_config.max_positions}; "
                f"use --sequence-length {decoder_config.max_positions} or less."
            )
        if not decoder_config.rotary_dim:
            return
        for kind in decoder_config.attention_kinds(layers):
            cos, sin = rope_tables(hf_config, decoder_config.rotary_dim, length, kind)
            same = (k for k in self.tables if torch.equal(cos, self.get_buffer(f"cos_{k}")))
            self.tables[kind] = next(same, kind)
            if self.tables[kind] == kind:
                self.register_buffer(f"cos_{kind}", cos, persistent=False)
                self.register_buffer(f"sin_{kind}", sin, persistent=False)

    def forward(self, position_ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """position_ids int [batch, new] -> {kind of layer: (cos, sin), each [batch, new, rotary_dim]}."""
        rows = {
            kind: (
                F.embedding(position_ids, self.get_buffer(f"cos_{kind}")),
                F.embedding(position_ids, self.get_buffer(f"sin_{kind}")),
            )
            for kind in sorted(set(self.tables.values()))
        }
        return {kind: rows[table] for kind, table in self.tables.items()}
