"""Matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from converters.coreml.read.ops.registry import Call, op


@op("linear")
def linear(x: Tensor, weight: Tensor, call: Call, bias: Tensor | None = None) -> Tensor:
    """Product x @ weight.T + bias, with a weight [out, in]; constants of another type are converted."""
    kind = call.carrier
    return F.linear(x.to(kind), weight.to(kind), None if bias is None else bias.to(kind))


@op("matmul")
def matmul(x: Tensor, y: Tensor, call: Call, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    """Batched matrix product, with broadcasting of the batch axes; a constant of another type is converted."""
    x, y = x.to(call.carrier), y.to(call.carrier)
    if transpose_x and x.dim() > 1:
        x = x.transpose(-1, -2)
    if transpose_y and y.dim() > 1:
        y = y.transpose(-1, -2)
    return torch.matmul(x, y)


@op("einsum")
def einsum(values: list[Tensor], equation: str) -> Tensor:
    """Einstein sum of two tensors."""
    return torch.einsum(equation, *values)
