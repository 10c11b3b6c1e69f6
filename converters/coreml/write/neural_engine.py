"""The interface for the Neural Engine: static shapes, a prefill and a decode function, chunks of layers.

Flexible shapes together with states run on the CPU only (coremltools issue 2600), so each length is a function of
its own. A chunk holds consecutive layers; the first one embeds, the last one gives logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from converters.coreml.backend import load_coremltools
from converters.coreml.format import COUNT, HIDDEN_IN, MASK, POSITION, TOKENS
from converters.coreml.write.state_cache import StateCache, StateLayout
from edkm_export.decoder.config import FULL, SLIDING
from edkm_export.decoder.context import MASKED, Context, sliding_mask
from edkm_export.decoder.decoder import Decoder
from edkm_export.decoder.delta_rule import CHUNK, TriangleBuffers
from edkm_export.decoder.positions import PositionTables
from edkm_export.decoder.states import Columns, Recurrence

__all__ = ["Chunk", "LayerRange", "example_inputs", "input_types"]

_STATE_MULTIPLE = (
    32  # sizes of a state that is not a multiple of it fail on the device (coremltools issue 2631)
)


@dataclass(frozen=True)
class LayerRange:
    """Layers of a chunk: from `first` to `end`, exclusive, of `total`."""

    first: int
    end: int
    total: int

    @property
    def embeds(self) -> bool:
        """True for the first chunk."""
        return self.first == 0

    @property
    def gives_logits(self) -> bool:
        """True for the last chunk."""
        return self.end == self.total


class Chunk(nn.Module):
    """Some layers of a decoder with their cache, for a fixed number of new tokens.

    Args:
        decoder: the whole model.
        tables: its position tables, as long as the context.
        layers: of this chunk.
        new: tokens of one call.

    Attributes:
        layout: of its states.
        counts: whether it is told how many of its tokens are real: padding must not enter a state that does not grow.
    """

    offsets: Tensor
    key_positions: Tensor

    def __init__(self, decoder: Decoder, tables: PositionTables, layers: LayerRange, new: int) -> None:
        super().__init__()
        self.decoder, self.tables, self.layers = decoder, tables, layers
        held = slice(layers.first, layers.end)
        self.layout = StateLayout.of(decoder.config, tables.length, held, _STATE_MULTIPLE)
        self.layout.add_to(self)
        self.new = new
        self.counts = new > 1 and bool(self.layout.places[Columns])
        self.register_buffer("offsets", torch.arange(new, dtype=torch.int32)[None], persistent=False)
        if self.layout.places[Recurrence]:
            self.triangle = TriangleBuffers(min(new, CHUNK))
        kinds = decoder.config.layer_kinds[layers.first : layers.end]
        self.window = decoder.config.sliding_window if SLIDING in kinds else None
        if self.window is not None:
            keys = torch.arange(tables.length, dtype=torch.int32)[None]
            self.register_buffer("key_positions", keys, persistent=False)

    def forward(self, x: Tensor, position: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
        """Run the layers.

        Args:
            x: int [1, new] tokens for the first chunk, else float [1, new, hidden] of the chunk before.
            position: int [1], that of the first new token.
            mask: additive float [1, 1, new, context].
            count: int [1], how many of the tokens are real, where `counts`; the others follow them.

        Returns:
            float [1, new, vocab_size] logits of the last chunk, else [1, new, hidden].
        """
        positions = position[:, None] + self.offsets
        masks = {FULL: mask.clamp(min=MASKED)}
        if self.window is not None:
            masks[SLIDING] = sliding_mask(masks[FULL], positions, self.key_positions, self.window)
        real = None if count is None else (self.offsets < count).float().unsqueeze(-1)
        triangle = self.triangle.masks() if self.layout.places[Recurrence] else None
        context = Context(positions, self.tables(positions), masks, real, triangle)
        stack = self.decoder.stack
        hidden = x
        if self.layers.embeds:
            hidden = stack.embed(x, context)  # type: ignore[operator]
            context = stack.with_layer_inputs(context, x, hidden)  # type: ignore[operator]
        begin = position[0]
        cache = StateCache(self, self.layout, self.decoder.config, begin, begin + self.new, count=count)
        hidden = stack.through(hidden, context, cache, self.layers.first, self.layers.end)  # type: ignore[operator]
        if not self.layers.gives_logits:
            return hidden  # type: ignore[no-any-return]
        norm = stack.get_submodule(self.decoder.config.names.final_norm)
        return self.decoder.head(norm(hidden))


def example_inputs(chunk: Chunk) -> tuple[Tensor, ...]:
    """Inputs to trace a chunk with."""
    tokens = torch.zeros(1, chunk.new, dtype=torch.int32)
    hidden = torch.zeros(1, chunk.new, chunk.decoder.config.hidden_size)
    mask = torch.zeros(1, 1, chunk.new, chunk.tables.length)
    first = tokens if chunk.layers.embeds else hidden
    count = (torch.ones(1, dtype=torch.int32),) if chunk.counts else ()
    return (first, torch.zeros(1, dtype=torch.int32), mask, *count)


def input_types(chunk: Chunk) -> list[Any]:
    """`coremltools.TensorType` of its inputs."""
    ct = load_coremltools()
    import numpy as np

    if chunk.layers.embeds:
        first = ct.TensorType(TOKENS, (1, chunk.new), dtype=np.int32)
    else:
        shape = (1, chunk.new, chunk.decoder.config.hidden_size)
        first = ct.TensorType(HIDDEN_IN, shape, dtype=np.float16)
    return [
        first,
        ct.TensorType(POSITION, (1,), dtype=np.int32),
        ct.TensorType(MASK, (1, 1, chunk.new, chunk.tables.length), dtype=np.float16),
        *([ct.TensorType(COUNT, (1,), dtype=np.int32)] if chunk.counts else []),
    ]
