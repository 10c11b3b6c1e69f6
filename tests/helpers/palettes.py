"""Random palettized tensors, and a decoder that shares no code with the product's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from edkm_export.palette import PalettizedTensor

__all__ = ["numpy_decode", "numpy_pack", "numpy_unpack", "random_palette"]


def numpy_pack(values: NDArray[np.uint8], n_bits: int) -> NDArray[np.uint8]:
    """Bit stream of the values, least significant bit first."""
    bits = values.reshape(-1, 1) >> np.arange(n_bits) & 1
    return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little")


def numpy_unpack(stream: NDArray[np.uint8], n_bits: int, count: int) -> NDArray[np.uint8]:
    """Inverse of `numpy_pack`."""
    bits = np.unpackbits(stream, bitorder="little")[: count * n_bits].reshape(count, n_bits)
    return (bits.astype(int) << np.arange(n_bits)).sum(1).astype(np.uint8)


def random_palette(
    shape: Sequence[int] = (8, 6),
    n_bits: int = 3,
    groups: tuple[int, int] = (1, 1),
    dim: int = 1,
    *,
    int8: bool = False,
    name: str = "layer.weight",
    seed: int = 0,
) -> PalettizedTensor:
    """A palette of random entries, each of its indices drawn from the whole LUT."""
    generator = torch.Generator().manual_seed(seed)
    size = (*groups, 1 << n_bits, dim)
    scale = None
    if int8:
        lut = torch.randint(-127, 128, size, dtype=torch.int8, generator=generator)
        scale = (torch.rand(groups, generator=generator) / 127 + 1e-3).half()
    else:
        lut = torch.randn(size, generator=generator).half()
    indices = torch.randint(
        1 << n_bits, (shape[0] // dim, *shape[1:]), dtype=torch.uint8, generator=generator
    )
    return PalettizedTensor.from_indices(name, lut, indices, shape=shape, lut_scale=scale)


def numpy_decode(tensor: PalettizedTensor) -> NDArray[np.float16]:
    """Dense weight, one element at a time."""
    groups_out, groups_in, _, dim = tensor.lut.shape
    rows, columns = tensor.shape[0] // dim, math.prod(tensor.shape[1:])
    codes = numpy_unpack(tensor.indices.numpy(), tensor.n_bits, rows * columns).reshape(rows, columns)
    lut = tensor.lut.numpy()
    if tensor.lut_scale is not None:
        scale = tensor.lut_scale.numpy().astype(np.float32)
        lut = (lut.astype(np.float32) * scale[:, :, None, None]).astype(np.float16)
    dense = np.empty((rows * dim, columns), np.float16)
    for row in range(rows):
        for column in range(columns):
            table = lut[row * groups_out // rows, column * groups_in // columns]
            dense[row * dim : (row + 1) * dim, column] = table[codes[row, column]]
    return dense.reshape(tensor.shape)
