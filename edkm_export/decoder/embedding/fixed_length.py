"""An embedding model over texts of one length, without a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edkm_export.decoder.embedding.embedding_model import EmbeddingModel, visible_masks
from edkm_export.decoder.positions import PositionTables

__all__ = ["FixedLength"]


class FixedLength(nn.Module):
    """An embedding model over a fixed number of positions, its tables held as constants.

    A shorter text is padded, on the right or, where positions are relative, on the left.

    Args:
        model: the embedding model.
        hf_config: Hugging Face configuration, for the position tables.
        length: number of positions.

    Raises:
        ConversionError: see `PositionTables`.
    """

    positions: Tensor

    def __init__(self, model: EmbeddingModel, hf_config: dict[str, Any], length: int) -> None:
        super().__init__()
        self.decoder = model
        positions = torch.arange(length)[None]
        self.register_buffer("positions", positions.int(), persistent=False)
        self.rotary: list[str] = []
        for kind, (cos, sin) in PositionTables(model.config, hf_config, length)(positions).items():
            self.rotary.append(kind)
            # Copies, since a trace takes no tensor under two names; a converter merges equal constants again.
            self.register_buffer(f"cos_{kind}", cos.clone(), persistent=False)
            self.register_buffer(f"sin_{kind}", sin.clone(), persistent=False)
        visible = visible_masks(model.config, positions)
        self.kinds = tuple(visible)
        for kind, mask in visible.items():
            self.register_buffer(f"mask_{kind}", mask, persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings.

        Args:
            input_ids: int32 [1, length].
            attention_mask: int32 [1, length], as `EmbeddingModel` takes it.

        Returns:
            float [1, dimension].
        """
        # Learned tables must be looked up by the program: a constant result would hide the table's name.
        nothing = input_ids * 0
        types = nothing if self.decoder.config.token_types else None
        positions = self.positions
        if self.decoder.config.names.positions is not None:
            positions = positions + nothing
        rotary = {
            kind: (self.get_buffer(f"cos_{kind}"), self.get_buffer(f"sin_{kind}")) for kind in self.rotary
        }
        visible = {kind: self.get_buffer(f"mask_{kind}") for kind in self.kinds}
        _, embeddings = self.decoder(input_ids, attention_mask, types, positions, rotary, visible)
        return embeddings  # type: ignore[no-any-return]
