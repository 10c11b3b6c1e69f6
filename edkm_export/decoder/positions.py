"""Position tables of a decoder, as constants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edkm_export.decoder.config import ATTENDS, DecoderConfig
from edkm_export.decoder.rope import rope_tables
from edkm_export.errors import ConversionError

__all__ = ["PositionTables", "table_of_queries"]

_QUERIES = "{}_queries"
_Table = TypeVar("_Table")


class PositionTables(nn.Module):
    """Cosines and sines of `length` positions for each kind of layer that the model has.

    Kinds whose tables are equal share them. Layers without rotation need none. Where queries grow with their position,
    the kind "full_queries" has the tables of queries.

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
        for kind in _rotated_kinds(decoder_config, layers):
            cos, sin = rope_tables(
                hf_config, decoder_config.rotary_of(kind), length, kind,
                interleaved=decoder_config.rotary_interleaved, alpha=decoder_config.rotary_alpha,
            )  # fmt: skip
            self._hold(kind, cos, sin)
            if decoder_config.query_growth is not None:
                factors = _growth(length, *decoder_config.query_growth)
                self._hold(_QUERIES.format(kind), cos * factors, sin * factors)

    def _hold(self, kind: str, cos: Tensor, sin: Tensor) -> None:
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


def table_of_queries(tables: Mapping[str, _Table], kind: str) -> _Table:
    """What queries of a kind of layer rotate with, by the names that `PositionTables` gives."""
    return tables.get(_QUERIES.format(kind), tables[kind])


def _rotated_kinds(config: DecoderConfig, layers: slice) -> list[str]:
    if not config.rotary_dim:
        return []
    numbered = list(enumerate(config.layer_kinds))[layers]
    return sorted({kind for layer, kind in numbered if kind in ATTENDS and layer not in config.unrotated})


def _growth(length: int, beta: float, original: float) -> Tensor:
    """Factors on queries, float32 [length, 1]; see `DecoderConfig.query_growth`."""
    positions = torch.arange(length, dtype=torch.float64)[:, None]
    return (1 + beta * torch.log1p(torch.floor(positions / original))).float()
