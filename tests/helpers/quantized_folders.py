"""Weights as quantized folders hold them, with what they stand for, computed block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["fp8_blocks", "metal", "one_scale"]

Weights = dict[str, Tensor]


def fp8_blocks(
    rows: int, columns: int, *, scale: torch.dtype = torch.float32
) -> tuple[Callable[[Weights], None], Callable[[Weights], None]]:
    """Two changes of the weights of a model: into FP8 in blocks with their scales, and into what these stand for.

    Args:
        rows, columns: of a block; the last ones are cut off where they do not divide a weight.
        scale: dtype that scales are stored in; uint8 and float8_e8m0fnu hold exponents.
    """

    def each(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        down, across = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
        values, meant = torch.zeros_like(weight).to(torch.float8_e4m3fn), torch.zeros_like(weight)
        scales = torch.zeros(down, across)
        for row in range(down):
            for column in range(across):
                place = (slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns))
                found = weight[place].abs().max() / 448
                if scale.itemsize == 1:
                    found = torch.exp2(torch.log2(found).ceil())
                scales[row, column] = found
                values[place] = (weight[place] / found).to(torch.float8_e4m3fn)
                meant[place] = values[place].float() * found
        if scale == torch.uint8:
            return values, (torch.log2(scales) + 127).to(torch.uint8), meant
        return values, scales.to(scale), meant

    return _change(lambda name, parts: {name: parts[0], f"{name}_scale_inv": parts[1]}, each), _meant(each)


def one_scale(shape: tuple[int, ...]) -> tuple[Callable[[Weights], None], Callable[[Weights], None]]:
    """The same with one scale a weight, and a scale of activations beside it."""

    def each(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = weight.abs().max() / 448
        values = (weight / scale).to(torch.float8_e4m3fn)
        return values, scale.reshape(shape), values.float() * scale

    def stored(name: str, parts: tuple[Tensor, ...]) -> Weights:
        beside = name.removesuffix("weight") + "activation_scale"
        return {name: parts[0], f"{name}_scale_inv": parts[1], beside: torch.tensor(0.5)}

    return _change(stored, each), _meant(each)


def metal(bits: int, group: int) -> tuple[Callable[[Weights], None], Callable[[Weights], None]]:
    """The same as affine integers, packed from the lowest bits of 32 on."""

    def each(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        groups = weight.reshape(len(weight), -1, group)
        least, most = groups.amin(-1), groups.amax(-1)
        scales = (most - least) / (2**bits - 1)
        levels = ((groups - least[..., None]) / scales[..., None]).round().to(torch.int64)
        meant = (levels * scales[..., None] + least[..., None]).reshape(weight.shape)
        fields = levels.reshape(len(weight), -1, 32 // bits)
        packed = sum(fields[..., place] * 2 ** (bits * place) for place in range(32 // bits))
        return packed.to(torch.uint32), scales, meant, least

    def stored(name: str, parts: tuple[Tensor, ...]) -> Weights:
        stem = name.removesuffix("weight")
        return {name: parts[0], f"{stem}scales": parts[1], f"{stem}qbiases": parts[3]}

    return _change(stored, each), _meant(each)


def _change(
    stored: Callable[[str, Any], Weights], each: Callable[[Tensor], tuple[Tensor, ...]]
) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        for name in [name for name in weights if "_proj" in name]:
            weights.update(stored(name, each(weights[name])))

    return change


def _meant(each: Callable[[Tensor], tuple[Tensor, ...]]) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        for name in [name for name in weights if "_proj" in name]:
            weights[name] = each(weights[name])[2]

    return change
