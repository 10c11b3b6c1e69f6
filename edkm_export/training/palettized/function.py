"""Products with a palettized weight that is gathered again in the backward pass instead of being saved.

Saved are the input, the indices (one byte a weight, shared by all calls of a step), the table, and references to
the master weight and the LUT. Autograd would save the weight itself: 2 bytes a weight, 13 GB at 7B parameters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from edkm_export.training.palettized.clusters import Clusters
from edkm_export.training.palettized.tables import look_up

__all__ = ["ConvFunction", "EmbeddingFunction", "LinearFunction", "WeightFunction"]


def _save(
    ctx: Any, clusters: Clusters, weight: Tensor, lut: Tensor, dtype: torch.dtype, *inputs: Tensor
) -> None:
    ctx.clusters, ctx.soft, ctx.dtype = clusters, clusters.is_soft, dtype
    indices = clusters.product_indices(weight)
    ctx.save_for_backward(indices, clusters.table(dtype), weight, lut, *inputs)


def _dense(ctx: Any, saved: tuple[Tensor, ...]) -> Tensor:
    """The weight of the forward pass, in its shape and the product's dtype.

    `saved` is `ctx.saved_tensors`, which gradient checkpointing allows to be read once only.
    """
    indices, table, weight = saved[:3]
    clusters: Clusters = ctx.clusters
    if ctx.soft:
        return clusters.soft_values(ctx.dtype)
    return clusters.decode(table, indices).view(weight.shape)


def _pull_back(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of master weight and LUT from that of the palettized weight, in the weight's shape."""
    indices, _, weight = saved[:3]
    clusters: Clusters = ctx.clusters
    need_weight, need_lut = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    clusters.note_gradient()
    if clusters.defers_gradients:
        return (grad.to(weight.dtype) if need_weight else None), None
    grad_lut = None
    if need_lut and not ctx.soft:
        grad_lut = clusters.lut_gradient(clusters.grouped(grad.contiguous()), indices)
    if clusters.method.backward == "straight-through" or (clusters.method.backward == "dkm" and not ctx.soft):
        return (grad.to(weight.dtype) if need_weight else None), grad_lut
    exact, exact_lut = clusters.soft_gradients(clusters.grouped(grad))
    if need_lut and ctx.soft:
        grad_lut = exact_lut
    return (exact if need_weight else None), grad_lut


class WeightFunction(torch.autograd.Function):
    """The palettized weight itself: apply(weight, lut, clusters, dtype) -> `dtype`, shape of the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, lut: Tensor, clusters: Clusters, dtype: torch.dtype) -> Tensor:  # noqa: D102
        _save(ctx, clusters, weight, lut, dtype)
        return _forward_weight(clusters, weight, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        return (*_pull_back(ctx, ctx.saved_tensors, grad), None, None)


def _forward_weight(clusters: Clusters, weight: Tensor, dtype: torch.dtype) -> Tensor:
    if clusters.is_soft:
        return clusters.soft_values(dtype)
    return clusters.decode(clusters.table(dtype), clusters.product_indices(weight)).view(weight.shape)


class LinearFunction(torch.autograd.Function):
    """apply(weight [out, in], lut, bias or None, x [..., in], clusters) -> [..., out], in the dtype of x."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, weight: Tensor, lut: Tensor, bias: Tensor | None, x: Tensor, clusters: Clusters
    ) -> Tensor:
        _save(ctx, clusters, weight, lut, x.dtype, x)
        ctx.bias_dtype = None if bias is None else bias.dtype
        dense = _forward_weight(clusters, weight, x.dtype)
        return F.linear(x, dense, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        saved = ctx.saved_tensors
        x = saved[4]
        flat = grad.reshape(-1, grad.shape[-1])
        grad_weight = grad_lut = grad_bias = grad_x = None
        if ctx.needs_input_grad[3]:
            grad_x = (flat @ _dense(ctx, saved)).view(x.shape)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            grad_weight, grad_lut = _pull_back(ctx, saved, flat.t() @ x.reshape(-1, x.shape[-1]))
        if ctx.needs_input_grad[2]:
            grad_bias = flat.sum(0).to(ctx.bias_dtype)
        return grad_weight, grad_lut, grad_bias, grad_x, None


class EmbeddingFunction(torch.autograd.Function):
    """apply(weight [rows, width], lut, ids int64 [...], clusters, padding row or -1, dtype) -> [..., width]."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        weight: Tensor,
        lut: Tensor,
        ids: Tensor,
        clusters: Clusters,
        padding: int,
        dtype: torch.dtype,
    ) -> Tensor:
        _save(ctx, clusters, weight, lut, dtype, ids)
        ctx.padding = padding
        indices = clusters.product_indices(weight)
        if clusters.is_soft or indices.is_floating_point():
            return F.embedding(ids, _forward_weight(clusters, weight, dtype))
        rows, table = _rows(indices, clusters.table(dtype), weight.shape, ids)
        return look_up(table, rows).view(*ids.shape, weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        saved = ctx.saved_tensors
        weight, ids = saved[2], saved[4]
        dense = torch.ops.aten.embedding_dense_backward(
            grad.to(weight.dtype).contiguous(), ids, weight.shape[0], ctx.padding, False
        )
        return (*_pull_back(ctx, saved, dense), None, None, None, None)


def _rows(indices: Tensor, table: Tensor, shape: torch.Size, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the rows that are asked for, and the table of each: as [1, n * width] or [n, width]."""
    flat = ids.reshape(-1)
    rows = indices.view(shape).index_select(0, flat)
    if len(table) == 1:
        return rows.view(1, -1), table
    return rows, table.index_select(0, torch.div(flat, shape[0] // len(table), rounding_mode="floor"))


class ConvFunction(torch.autograd.Function):
    """apply(weight [out, in / groups, h, w], lut, bias or None, x, clusters, settings) -> F.conv2d's result.

    `settings` are stride, padding, dilation and groups.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        weight: Tensor,
        lut: Tensor,
        bias: Tensor | None,
        x: Tensor,
        clusters: Clusters,
        settings: tuple[Any, Any, Any, int],
    ) -> Tensor:
        _save(ctx, clusters, weight, lut, x.dtype, x)
        ctx.settings, ctx.bias_dtype = settings, None if bias is None else bias.dtype
        dense = _forward_weight(clusters, weight, x.dtype)
        return F.conv2d(x, dense, None if bias is None else bias.to(x.dtype), *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        saved = ctx.saved_tensors
        x = saved[4]
        stride, padding, dilation, groups = ctx.settings
        need_weight = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        # The weight is looked at for the gradient of the input only; otherwise its shape is enough.
        dense = _dense(ctx, saved) if ctx.needs_input_grad[3] else x.new_empty(saved[2].shape)
        grad_x, grad_dense, grad_bias = torch.ops.aten.convolution_backward(
            grad,
            x,
            dense,
            None if ctx.bias_dtype is None else [len(dense)],
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            [ctx.needs_input_grad[3], need_weight, ctx.needs_input_grad[2]],
        )
        grads = _pull_back(ctx, saved, grad_dense) if need_weight else (None, None)
        return (*grads, None if grad_bias is None else grad_bias.to(ctx.bias_dtype), grad_x, None, None)
