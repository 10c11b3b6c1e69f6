"""Compressed constants, decoded once when a program is first run.

Unlike the other ops, these see their operands as stored. The result is rounded once to the declared type,
whatever the precision of the run: decoding is part of the weight, not of the arithmetic.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from converters.coreml.read.ops.registry import UnsupportedForm, op
from edkm_export.packing import SUPPORTED_BITS, packed_size_bytes, unpack

_LONGEST_VECTOR = 64  # a short index of a long vector would decode to any size
_DECODE_ROWS = 1024  # rows decoded at a time, to bound the temporaries of the gather


@op("constexpr_lut_to_dense")
def constexpr_lut_to_dense(
    indices: Tensor, lut: Tensor, shape: list[int] | None = None, vector_axis: int | None = None
) -> Tensor:
    """Look values up by index.

    iOS 16: `indices` uint8 [bytes], a bit stream; `lut` [2**bits]; `shape` that of the result.
    iOS 18: `indices` [*d]; `lut` [*g, 2**bits, size], g dividing d; vectors run along `vector_axis`.
    """
    if shape is not None:
        return lut[unpack_indices(indices, lut.numel(), shape).int()]
    rank = indices.dim()
    if lut.dim() != rank + 2 or any(
        size % groups for size, groups in zip(indices.shape, lut.shape, strict=False)
    ):
        raise ValueError(f"lut {list(lut.shape)} does not fit indices {list(indices.shape)}")
    entries, size = lut.shape[-2:]
    if indices.numel() and int(indices.max()) >= entries:
        raise ValueError(f"index {int(indices.max())} is beyond the {entries} entries of the LUT")
    if size > 1 and vector_axis is None:
        raise ValueError(f"vectors of {size} without vector_axis")
    table = lut.reshape(-1) if size == 1 else lut.reshape(-1, size)
    group = torch.zeros([1] * rank, dtype=torch.int32)  # number of the LUT, broadcast over the ungrouped axes
    for axis, (length, groups) in enumerate(zip(indices.shape, lut.shape, strict=False)):
        if groups > 1:
            number = torch.arange(length, dtype=torch.int32) // (length // groups)
            group = group * groups + number.reshape([-1 if other == axis else 1 for other in range(rank)])
    if size > _LONGEST_VECTOR:
        raise ValueError(f"vectors of {size}")
    dense = torch.empty(*indices.shape, size, dtype=lut.dtype)
    for start in range(0, indices.shape[0], _DECODE_ROWS):
        rows = slice(start, start + _DECODE_ROWS)
        chosen = group[rows] if group.shape[0] > 1 else group
        block = chosen * entries + indices[rows]
        dense[rows] = table.index_select(0, block.reshape(-1)).view(*block.shape, size)
    if size == 1:
        return dense.squeeze(-1)
    axis = (vector_axis or 0) % rank
    return dense.movedim(-1, axis + 1).flatten(axis, axis + 1)


def unpack_indices(stream: Tensor, entries: int, shape: list[int]) -> Tensor:
    """Unpack the indices of an iOS 16 palette, uint8 `shape`.

    Args:
        stream: uint8 [bytes].
        entries: size of the LUT, which tells the bits.
        shape: of the dense weight.
    """
    n_bits = entries.bit_length() - 1
    if entries != 1 << n_bits or n_bits not in SUPPORTED_BITS:
        raise ValueError(f"a LUT of {entries} entries")
    count = math.prod(shape)
    if stream.numel() != packed_size_bytes(count, n_bits):
        raise ValueError(
            f"{stream.numel()} bytes of indices, but shape {shape} takes {packed_size_bytes(count, n_bits)} "
            f"at {n_bits} bits"
        )
    return unpack(stream, n_bits, count).reshape(shape)


@op("constexpr_blockwise_shift_scale")
def constexpr_blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """Compute (data - offset) * scale, with one scale and offset a block; blocks divide each axis evenly."""
    if data.dim() != scale.dim() or any(
        size % blocks for size, blocks in zip(data.shape, scale.shape, strict=True)
    ):
        raise ValueError(f"scale {list(scale.shape)} does not fit data {list(data.shape)}")
    if offset is not None and offset.shape != scale.shape:
        raise ValueError(f"offset {list(offset.shape)} has another shape than scale {list(scale.shape)}")
    blocked = [
        part
        for size, blocks in zip(data.shape, scale.shape, strict=True)
        for part in (blocks, size // blocks)
    ]
    single = [part for blocks in scale.shape for part in (blocks, 1)]
    values = data.float().reshape(blocked)
    if offset is not None:
        values = values - offset.float().reshape(single)
    return (values * scale.float().reshape(single)).reshape(data.shape).to(scale.dtype)


@op("constexpr_lut_to_sparse")
def constexpr_lut_to_sparse(
    indices_mask: Tensor, indices_nonzero_data: Tensor, lut: Tensor, vector_axis: int | None = None
) -> tuple[Tensor, Tensor]:
    """Look up the indices of a sparse tensor; vectors spread its mask along `vector_axis`.

    Args:
        indices_mask: uint1 [*d].
        indices_nonzero_data: [set bits of the mask].
        lut: as for constexpr_lut_to_dense.
        vector_axis: along which vectors run.

    Returns:
        The mask of the values, uint1, and the values where it is set.
    """
    indices = constexpr_sparse_to_dense(indices_nonzero_data, indices_mask)
    dense = constexpr_lut_to_dense(indices, lut, None, vector_axis)
    mask = indices_mask
    if lut.shape[-1] > 1:
        mask = mask.repeat_interleave(lut.shape[-1], vector_axis)
    return mask, dense[mask.bool()]


@op("constexpr_sparse_blockwise_shift_scale")
def constexpr_sparse_blockwise_shift_scale(
    data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute (data - offset) * scale where the mask is set; returns the mask and these values."""
    dense = constexpr_blockwise_shift_scale(constexpr_sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask.bool()]


@op("constexpr_affine_dequantize")
def constexpr_affine_dequantize(
    quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: int
) -> Tensor:
    """Compute (quantized_data - zero_point) * scale; both are scalars, or vectors along `axis`."""
    around = [1] * quantized_data.dim()
    around[axis] = -1
    shift, factor = (
        value.float() if value.numel() == 1 else value.float().reshape(around)
        for value in (zero_point, scale)
    )
    return ((quantized_data.float() - shift) * factor).to(scale.dtype)


@op("constexpr_cast")
def constexpr_cast(source_val: Tensor, output_dtype: str) -> Tensor:
    """source_val in another floating-point type."""
    if output_dtype not in ("fp16", "fp32"):
        raise UnsupportedForm(f"output_dtype {output_dtype!r}")
    return source_val.to(torch.float32 if output_dtype == "fp32" else torch.float16)


@op("constexpr_sparse_to_dense")
def constexpr_sparse_to_dense(nonzero_data: Tensor, mask: Tensor, shape: list[int] | None = None) -> Tensor:
    """Values where the mask is set, zero elsewhere. iOS 16: `mask` is a bit stream and `shape` is given."""
    if shape is not None:
        mask = unpack_indices(mask, 2, shape)
    set_ = mask.bool()
    if int(set_.sum()) != nonzero_data.numel():
        raise ValueError(f"{int(set_.sum())} bits set in the mask, but {nonzero_data.numel()} values")
    dense = torch.zeros(mask.shape, dtype=nonzero_data.dtype)
    dense[set_] = nonzero_data.reshape(-1)
    return dense
