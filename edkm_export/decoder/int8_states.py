"""Keys and values as int8, in the operations that every tracer knows; `edkm_export.kv_cache` says how."""

from __future__ import annotations

import torch
from torch import Tensor

from edkm_export.kv_cache import LARGEST_CODE, LEAST_SCALE

__all__ = ["from_int8", "to_int8"]


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """New keys or values [batch, heads, new, head_dim], float.

    Returns:
        Codes int8 of the same shape, and scales [batch, heads, new, 1] of the dtype of x.
    """
    scales = (x.abs().amax(-1, keepdim=True) / LARGEST_CODE).clamp(min=LEAST_SCALE)
    return (x / scales).round().to(torch.int8), scales


def from_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """Keys or values [batch, heads, total, head_dim] of the dtype of the scales [batch, heads, total, 1]."""
    return codes.to(scales.dtype) * scales
