"""The fused attention of iOS 18."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from converters.coreml.read.ops.registry import op


@op("scaled_dot_product_attention")
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """Attention softmax(query @ key.T / sqrt(E) + mask) @ value; a boolean mask is true where attended."""
    # Written out: torch's fused kernels give 0 instead of NaN for a row that is masked as a whole.
    scores = torch.matmul(query / math.sqrt(query.shape[-1]), key.transpose(-1, -2))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores.masked_fill_(attn_mask.logical_not(), -math.inf)
        else:
            scores = scores + attn_mask
    return torch.matmul(torch.softmax(scores, -1), value)
