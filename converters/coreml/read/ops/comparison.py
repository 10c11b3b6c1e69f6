"""Comparisons, logic and selection."""

from __future__ import annotations

import torch
from torch import Tensor

from converters.coreml.read.ops.registry import op


@op("equal")
def equal(x: Tensor, y: Tensor) -> Tensor:
    """Compare x == y."""
    return x == y


@op("not_equal")
def not_equal(x: Tensor, y: Tensor) -> Tensor:
    """Compare x != y."""
    return x != y


@op("less")
def less(x: Tensor, y: Tensor) -> Tensor:
    """Compare x < y."""
    return x < y


@op("less_equal")
def less_equal(x: Tensor, y: Tensor) -> Tensor:
    """Compare x <= y."""
    return x <= y


@op("greater")
def greater(x: Tensor, y: Tensor) -> Tensor:
    """Compare x > y."""
    return x > y


@op("greater_equal")
def greater_equal(x: Tensor, y: Tensor) -> Tensor:
    """Compare x >= y."""
    return x >= y


@op("logical_and")
def logical_and(x: Tensor, y: Tensor) -> Tensor:
    """Combine by and."""
    return torch.logical_and(x, y)


@op("logical_or")
def logical_or(x: Tensor, y: Tensor) -> Tensor:
    """Combine by or."""
    return torch.logical_or(x, y)


@op("logical_xor")
def logical_xor(x: Tensor, y: Tensor) -> Tensor:
    """Combine by exclusive or."""
    return torch.logical_xor(x, y)


@op("logical_not")
def logical_not(x: Tensor) -> Tensor:
    """Negate."""
    return torch.logical_not(x)


@op("select", moves=True)
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Take a where cond is true, b elsewhere."""
    return torch.where(cond.bool(), a, b)
