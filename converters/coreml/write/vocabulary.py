"""Embedding and output head in parts of rows, for the Neural Engine.

It runs no layer with a dimension above 16,384, as users report, so the rows of the vocabulary are held in several
weights. An embedding that is the head too is split with it, so that the
parts are stored once. On disk the parts are weights of their own; `read.joined_vocabulary` makes one
weight of them again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from converters.coreml.format import row_part
from edkm_export.decoder.decoder import Decoder
from edkm_export.palette import PalettizedTensor

__all__ = [
    "LARGEST_DIMENSION",
    "RowSplit",
    "SplitEmbedding",
    "SplitHead",
    "plan_split",
    "split_palettes",
    "split_vocabulary",
]

LARGEST_DIMENSION = 16_384
"""Longest axis that the Neural Engine works on."""


@dataclass(frozen=True)
class RowSplit:
    """How the rows of a weight are cut.

    Attributes:
        name: of the weight.
        bounds: first row of each part, and the number of rows.
        groups: its LUTs along the rows; 1 also for a dense weight.
    """

    name: str
    bounds: tuple[int, ...]
    groups: int

    @property
    def parts(self) -> list[tuple[str, int, int]]:
        """Name, first row and end of each part."""
        pairs = zip(self.bounds, self.bounds[1:], strict=False)
        return [(row_part(self.name, start, end), start, end) for start, end in pairs]


def plan_split(name: str, rows: int, palette: PalettizedTensor | None) -> RowSplit | None:
    """Cut rows into parts of nearly the same size, each of whole LUT groups.

    Args:
        name: of the weight.
        rows: of the weight.
        palette: of the weight, None when it is dense.

    Returns:
        None when it needs no split, or when a single group is too long to be a part.
    """
    if rows <= LARGEST_DIMENSION:
        return None
    groups = 1 if palette is None else palette.groups[0]
    dim = 1 if palette is None else palette.dim
    unit = dim if groups == 1 else rows // groups
    if unit > LARGEST_DIMENSION:
        return None
    count = math.ceil(rows / LARGEST_DIMENSION)
    size = math.ceil(rows / count / unit) * unit
    if size > LARGEST_DIMENSION:  # rounding up to whole groups went too far
        size = LARGEST_DIMENSION // unit * unit
    return RowSplit(name, (*range(0, rows, size), rows), groups)


class _Parts(nn.Module):
    """Weights of the parts; an attribute is named as its part, without the module."""

    def __init__(self, split: RowSplit, weights: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.spans = [(name.rsplit(".", 1)[-1], start, end) for name, start, end in split.parts]
        for (name, _, _), weight in zip(self.spans, weights, strict=True):
            self.register_parameter(name, weight)

    def weights(self) -> list[tuple[Tensor, int, int]]:
        """Weight, first row and end of each part."""
        return [(self.get_parameter(name), start, end) for name, start, end in self.spans]


class SplitEmbedding(_Parts):
    """Looks each token up in every part, and keeps what the right one gives."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids int [batch, new] -> [batch, new, hidden]."""
        found: Tensor | None = None
        for weight, start, end in self.weights():
            inside = (input_ids >= start) & (input_ids < end)
            # Not clamped: that is a float16 op, in which tokens above 2,048 are not exact.
            rows = F.embedding(torch.where(inside, input_ids - start, torch.zeros_like(input_ids)), weight)
            found = rows if found is None else torch.where(inside.unsqueeze(-1), rows, found)
        assert found is not None
        return found


class SplitHead(_Parts):
    """Linear layers over the parts, side by side."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> [..., vocab_size]."""
        return torch.cat([F.linear(x, weight) for weight, _, _ in self.weights()], -1)


def split_vocabulary(decoder: Decoder, split: RowSplit) -> None:
    """Cut the output head of a decoder; when the embedding is tied to it, that one too."""
    whole = decoder.lm_head.weight
    parts = [nn.Parameter(whole[start:end], requires_grad=False) for _, start, end in split.parts]
    if decoder.config.tied:
        decoder.stack.add_module(decoder.config.names.embedding, SplitEmbedding(split, parts))
    decoder.lm_head = SplitHead(split, parts)  # type: ignore[assignment]


def split_palettes(
    palettized: Mapping[str, PalettizedTensor], split: RowSplit | None
) -> dict[str, PalettizedTensor]:
    """The palettes with one of them cut; the others as they are."""
    if split is None or split.name not in palettized:
        return dict(palettized)
    kept = {name: tensor for name, tensor in palettized.items() if name != split.name}
    return kept | {part.name: part for part in _cut(palettized[split.name], split)}


def _cut(tensor: PalettizedTensor, split: RowSplit) -> list[PalettizedTensor]:
    indices = tensor.unpack_indices()
    dim, group = tensor.dim, tensor.shape[0] // split.groups
    cut = []
    for name, start, end in split.parts:
        rows = slice(None) if split.groups == 1 else slice(start // group, end // group)
        scale = None if tensor.lut_scale is None else tensor.lut_scale[rows]
        part = indices[start // dim : end // dim]
        shape = (end - start, *tensor.shape[1:])
        cut.append(
            PalettizedTensor.from_indices(
                name, tensor.lut[rows], part, shape=shape, lut_scale=scale, lut_dtype=tensor.lut_dtype
            )
        )
    return cut
