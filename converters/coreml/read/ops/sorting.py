"""Sorting. Ties: the first position wins, as with a stable sort."""

from __future__ import annotations

import torch
from torch import Tensor

from converters.coreml.read.ops.registry import op


def _order(x: Tensor, axis: int, ascending: bool) -> Tensor:
    order: Tensor = torch.argsort(x, dim=axis, descending=not ascending, stable=True)
    return order


@op("argsort")
def argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    """Positions in sorted order."""
    return _order(x, axis, ascending)


@op("topk", moves=True)
def topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> tuple[Tensor, ...]:
    """Largest (or smallest) k values and their positions."""
    del sort, output_indices_dtype  # sort=False allows any order; the output declares its type
    order = _order(x, axis, ascending).narrow(axis, 0, k)
    values = x.gather(axis, order)
    return (values, order) if return_indices else (values,)
