"""Blocks of space into channels or the batch, crops, and reversed sequences. Images are [batch, channels, h, w]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from converters.coreml.read.budget import require_computable
from converters.coreml.read.ops.registry import OutOfRange, op


@op("depth_to_space", moves=True)
def depth_to_space(x: Tensor, block_size: int) -> Tensor:
    """Channels into blocks of space; the block position is the slower part of the channel (as in TensorFlow)."""
    n, c, h, w = x.shape
    blocks = x.reshape(n, block_size, block_size, c // block_size**2, h, w)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(n, -1, h * block_size, w * block_size)


@op("space_to_depth", moves=True)
def space_to_depth(x: Tensor, block_size: int) -> Tensor:
    """Blocks of space into channels, the inverse of depth_to_space."""
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // block_size, block_size, w // block_size, block_size)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(n, c * block_size**2, h // block_size, w // block_size)


@op("space_to_batch", moves=True)
def space_to_batch(x: Tensor, block_shape: list[int], paddings: list[int]) -> Tensor:
    """Pad, then blocks of space into the batch; the block position is the slower part of the batch."""
    (rows, columns), (top, bottom, left, right) = block_shape, paddings
    require_computable([*x.shape[:2], max(0, x.shape[2] + top + bottom), max(0, x.shape[3] + left + right)])
    x = F.pad(x, [left, right, top, bottom])
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // rows, rows, w // columns, columns)
    return blocks.permute(3, 5, 0, 1, 2, 4).reshape(n * rows * columns, c, h // rows, w // columns)


@op("batch_to_space", moves=True)
def batch_to_space(x: Tensor, block_shape: list[int], crops: list[int]) -> Tensor:
    """Batch into blocks of space, the inverse of space_to_batch, then crop."""
    (rows, columns), (top, bottom, left, right) = block_shape, crops
    n, c, h, w = x.shape
    blocks = x.reshape(rows, columns, n // (rows * columns), c, h, w).permute(2, 3, 4, 0, 5, 1)
    whole = blocks.reshape(-1, c, h * rows, w * columns)
    return whole[:, :, top : h * rows - bottom, left : w * columns - right]


@op("crop", moves=True)
def crop(x: Tensor, crop_height: list[int], crop_width: list[int]) -> Tensor:
    """Cut (before, after) off the last two axes."""
    (top, bottom), (left, right) = crop_height, crop_width
    if min(top, bottom, left, right) < 0 or top + bottom > x.shape[-2] or left + right > x.shape[-1]:
        raise ValueError(f"crop {crop_height} and {crop_width} of {list(x.shape)}")
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


@op("reverse_sequence", moves=True)
def reverse_sequence(x: Tensor, lengths: Tensor, seq_axis: int = 0, batch_axis: int = 0) -> Tensor:
    """Reverse the first lengths[i] elements along `seq_axis` of slice i of `batch_axis`."""
    size, counts = x.shape[seq_axis], lengths.long().reshape(-1)
    if counts.numel() != x.shape[batch_axis]:
        raise ValueError(f"{counts.numel()} lengths for {x.shape[batch_axis]} sequences")
    if counts.numel() and not 0 <= int(counts.min()) <= int(counts.max()) <= size:
        raise OutOfRange(f"lengths {counts.tolist()} for sequences of {size}")
    position = torch.arange(size)
    source = torch.where(position < counts[:, None], counts[:, None] - 1 - position, position)
    moved = x.movedim((batch_axis, seq_axis), (0, 1)) if batch_axis % x.dim() != seq_axis % x.dim() else None
    if moved is None:
        raise ValueError(f"seq_axis and batch_axis are both {seq_axis}")
    index = source.reshape(*source.shape, *[1] * (moved.dim() - 2)).expand(moved.shape)
    return moved.gather(1, index).movedim((0, 1), (batch_axis, seq_axis))
