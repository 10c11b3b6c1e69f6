"""Lists of tensors. A write gives a new list; elements that were never written hold zeros."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from converters.coreml.read.budget import require_computable
from converters.coreml.read.ops.registry import Call, OutOfRange, TensorList, op

_MAX_LENGTH = 1 << 20


@op("make_list", moves=True)
def make_list(
    elem_shape: list[Any],
    call: Call,
    init_length: int = 1,
    dynamic_length: bool = True,
    dtype: str = "fp32",
) -> TensorList:
    """List of `init_length` elements; a string in `elem_shape` stands for a size that is known at run time."""
    del dtype  # of the declared type of the list
    if not 0 <= init_length <= _MAX_LENGTH:
        raise ValueError(f"init_length {init_length}")
    sizes = [1 if isinstance(size, str) else int(size) for part in elem_shape for size in _sizes(part)]
    require_computable(sizes)
    return TensorList((None,) * init_length, dynamic_length, torch.zeros(sizes, dtype=call.carrier))


def _sizes(part: Any) -> list[Any]:
    return part.reshape(-1).tolist() if isinstance(part, Tensor) else [part]


@op("list_length")
def list_length(ls: TensorList) -> Tensor:
    """Number of elements."""
    return torch.tensor(len(ls.elements), dtype=torch.int32)


@op("list_read", moves=True)
def list_read(ls: TensorList, index: int) -> Tensor:
    """The element at `index`."""
    return ls.read(index)


@op("list_write", moves=True)
def list_write(ls: TensorList, index: int, value: Tensor) -> TensorList:
    """Put an element at `index`; a list of dynamic length grows."""
    return ls.write(index, value)


@op("list_gather", moves=True)
def list_gather(ls: TensorList, indices: list[int]) -> Tensor:
    """The elements at `indices`, along a new first axis."""
    if not indices:
        return ls.empty.new_zeros(0, *ls.empty.shape)
    return torch.stack([ls.read(index) for index in indices])


@op("list_scatter", moves=True)
def list_scatter(ls: TensorList, indices: list[int], value: Tensor) -> TensorList:
    """Put value[i] at indices[i]."""
    if len(indices) != value.shape[0]:
        raise OutOfRange(f"{value.shape[0]} values for {len(indices)} indices")
    for index, element in zip(indices, value, strict=True):
        ls = ls.write(index, element)
    return ls
