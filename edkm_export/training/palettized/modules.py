"""Drop-in modules with palettized weights: Linear, Embedding, GPT-2's Conv1D and Conv2d."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edkm_export.training.palettized.clusters import Clusters
from edkm_export.training.palettized.function import (
    ConvFunction,
    EmbeddingFunction,
    LinearFunction,
    WeightFunction,
)

__all__ = [
    "PalettizedConv1D",
    "PalettizedConv2d",
    "PalettizedEmbedding",
    "PalettizedLinear",
    "PalettizedModule",
]


def _product_dtype(x: Tensor) -> torch.dtype:
    """What autocast would run a product in."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


class PalettizedModule(nn.Module):
    """Common part. Two modules may share their `Clusters`, as an embedding and a tied output head do."""

    def __init__(self, clusters: Clusters) -> None:
        super().__init__()
        self.clusters = clusters

    @property
    def weight(self) -> nn.Parameter:
        """The master weight. Code of transformers asks a layer for its weight's dtype and device."""
        return self.clusters.weight

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The palettized weight, differentiable, in its own shape."""
        self.clusters.fresh()
        weight, lut = self.clusters.weight, self.clusters.lut
        dense: Tensor = WeightFunction.apply(weight, lut, self.clusters, dtype)  # type: ignore[no-untyped-call]
        return dense

    def extra_repr(self) -> str:
        """Shape and bits, for print(model)."""
        rule = self.clusters.rule
        return f"{tuple(self.weight.shape)}, bits={rule.bits}, group_size={rule.group_size}, lut_dtype={rule.lut_dtype}"


class PalettizedLinear(PalettizedModule):
    """nn.Linear: x [..., in] -> [..., out]."""

    def __init__(self, clusters: Clusters, bias: nn.Parameter | None) -> None:
        super().__init__(clusters)
        self.bias = bias
        self.out_features, self.in_features = clusters.weight.shape

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        self.clusters.fresh()
        x = x.to(_product_dtype(x))
        y: Tensor = LinearFunction.apply(  # type: ignore[no-untyped-call]
            self.clusters.weight, self.clusters.lut, self.bias, x, self.clusters
        )
        return y


class PalettizedConv1D(PalettizedLinear):
    """transformers' Conv1D, a Linear whose weight GPT-2 holds transposed; here it is [out, in]."""

    def __init__(self, clusters: Clusters, bias: nn.Parameter | None) -> None:
        super().__init__(clusters, bias)
        self.nf, self.nx = clusters.weight.shape


class PalettizedEmbedding(PalettizedModule):
    """nn.Embedding: ids int64 [...] -> [..., width], in the dtype of the master weight, times a scale."""

    def __init__(self, clusters: Clusters, padding_idx: int | None, scale: float = 1.0) -> None:
        super().__init__(clusters)
        self.padding_idx, self.scale = padding_idx, scale
        self.num_embeddings, self.embedding_dim = clusters.weight.shape

    def forward(self, ids: Tensor) -> Tensor:  # noqa: D102
        self.clusters.fresh()
        weight = self.clusters.weight
        padding = -1 if self.padding_idx is None else self.padding_idx
        y: Tensor = EmbeddingFunction.apply(  # type: ignore[no-untyped-call]
            weight, self.clusters.lut, ids, self.clusters, padding, weight.dtype
        )
        return y if self.scale == 1 else y * self.scale


class PalettizedConv2d(PalettizedModule):
    """nn.Conv2d with zero padding: x [batch, in, h, w] -> [batch, out, h', w']."""

    def __init__(self, clusters: Clusters, bias: nn.Parameter | None, like: nn.Conv2d) -> None:
        super().__init__(clusters)
        self.bias = bias
        self.stride, self.dilation, self.groups = like.stride, like.dilation, like.groups
        self.padding, self._frame = _padding(like)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        self.clusters.fresh()
        x = F.pad(x.to(_product_dtype(x)), self._frame) if any(self._frame) else x.to(_product_dtype(x))
        settings = (self.stride, self.padding, self.dilation, self.groups)
        y: Tensor = ConvFunction.apply(  # type: ignore[no-untyped-call]
            self.clusters.weight, self.clusters.lut, self.bias, x, self.clusters, settings
        )
        return y


def _padding(like: nn.Conv2d) -> tuple[tuple[Any, ...], list[int]]:
    """Symmetric padding for the product, and a frame to add before it for "same" with even kernels."""
    if like.padding == "valid":
        return (0, 0), [0, 0, 0, 0]
    if like.padding == "same":
        total = [apart * (size - 1) for apart, size in zip(like.dilation, like.kernel_size, strict=True)]
        rows, columns = total
        return (0, 0), [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2]
    assert not isinstance(like.padding, str)
    return tuple(like.padding), [0, 0, 0, 0]
