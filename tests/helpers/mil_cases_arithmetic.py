"""Reductions, products, normalizations, convolutions and pools."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from tests.helpers.mil_cases import Case, integers, normal, positive

_x = normal(2, 3, 4)
_i = integers(-9, 9, 2, 3)
_AXES = np.array([0, -1], np.int32)


def _reduction(op: str, reference, data=_x, **kwargs) -> list[Case]:
    return [
        Case(
            op,
            {"x": data},
            lambda x: reference(x, (0, 2), True),
            {"axes": _AXES, "keep_dims": True},
            **kwargs,
        ),
        Case(
            op,
            {"x": data},
            lambda x: reference(x, (1,), False),
            {"axes": np.array([1])},
            note="drop",
            **kwargs,
        ),
        Case(
            op,
            {"x": data},
            lambda x: reference(x, (0, 1, 2), True),
            {"keep_dims": True},
            note="all",
            **kwargs,
        ),
    ]


REDUCTION = [
    *_reduction("reduce_sum", lambda x, axes, keep: torch.sum(x, axes, keep)),
    *_reduction("reduce_mean", lambda x, axes, keep: torch.mean(x, axes, keep)),
    *_reduction("reduce_max", lambda x, axes, keep: torch.amax(x, axes, keep)),
    *_reduction("reduce_min", lambda x, axes, keep: torch.amin(x, axes, keep)),
    *_reduction("reduce_sum_square", lambda x, axes, keep: torch.sum(x**2, axes, keep)),
    *_reduction("reduce_l1_norm", lambda x, axes, keep: torch.linalg.vector_norm(x, 1, axes, keep)),
    *_reduction("reduce_l2_norm", lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep)),
    *_reduction("reduce_log_sum_exp", lambda x, axes, keep: torch.log(torch.exp(x).sum(axes, keep))),
    *_reduction("reduce_log_sum", lambda x, axes, keep: torch.log(x.sum(axes, keep)), positive(2, 3, 4)),
    *_reduction("reduce_prod", lambda x, axes, keep: _product(x, axes, keep), positive(2, 3, 4)),
    Case("reduce_sum", {"x": _i}, lambda x: x.sum(1, dtype=torch.int32), {"axes": np.array([1])}, note="int"),
    Case("reduce_max", {"x": _i}, lambda x: x.amax(1), {"axes": np.array([1])}, note="int"),
    Case("reduce_argmax", {"x": _x}, lambda x: x.argmax(1).int(), {"axis": 1}),
    Case("reduce_argmin", {"x": _x}, lambda x: x.argmin(-1, True).int(), {"keep_dims": True}),
    Case("cumsum", {"x": _x}, lambda x: x.cumsum(1), {"axis": 1}),
    Case(
        "cumsum", {"x": _x}, lambda x: x.flip(1).cumsum(1).flip(1), {"axis": 1, "reverse": True}, note="back"
    ),
    # coremltools' own inference of `exclusive` raises
    Case(
        "cumsum",
        {"x": _x},
        lambda x: F.pad(x.cumsum(2), (1, 0))[..., :-1],
        {"axis": 2, "exclusive": True},
        note="exclusive",
        inferred=False,
    ),
]


def _product(x: torch.Tensor, axes: tuple[int, ...], keep: bool) -> torch.Tensor:
    return torch.exp(torch.log(x).sum(axes, keep))


_weight, _bias = normal(5, 4), normal(5)
_mask = np.where(np.tril(np.ones((3, 4))) > 0, 0, -1e4).astype(np.float32)


def _attention(query, key, value, attn_mask=None):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)


_qkv = {"query": normal(1, 2, 3, 8), "key": normal(1, 2, 4, 8), "value": normal(1, 2, 4, 5)}

PRODUCT = [
    Case("linear", {"x": _x}, lambda x: x @ torch.tensor(_weight).T, {"weight": _weight}),
    Case(
        "linear",
        {"x": _x},
        lambda x: x @ torch.tensor(_weight).T + torch.tensor(_bias),
        {"weight": _weight, "bias": _bias},
        note="bias",
    ),
    Case("matmul", {"x": normal(2, 3, 4), "y": normal(4, 5)}, lambda x, y: x @ y),
    Case(
        "matmul",
        {"x": normal(2, 4, 3), "y": normal(1, 5, 4)},
        lambda x, y: x.mT @ y.mT,
        {"transpose_x": True, "transpose_y": True},
        note="transposed",
    ),
    Case(
        "einsum",
        {"a": normal(2, 3, 4, 5), "b": normal(2, 5, 4, 6)},
        lambda a, b: torch.einsum("nchw,nwhu->nchu", a, b),
        {"equation": "nchw,nwhu->nchu"},
        tuple_input="values",
        inferred=False,  # needs the values of a tuple, which constants of a builder do not give
    ),
    Case("scaled_dot_product_attention", _qkv, _attention),
    Case(
        "scaled_dot_product_attention",
        {**_qkv, "attn_mask": _mask},
        _attention,
        note="float_mask",
    ),
    Case(
        "scaled_dot_product_attention",
        {**_qkv, "attn_mask": (_mask == 0).astype(np.int32)},
        lambda query, key, value, attn_mask: _attention(query, key, value, attn_mask != 0),
        note="bool_mask",
        boolean=("attn_mask",),
    ),
]

_image = normal(2, 3, 6, 5)
_gamma, _beta, _mean, _variance = positive(3), normal(3), normal(3), positive(3)
_wide_gamma, _wide_beta = positive(3, 4), normal(3, 4)


def _t(array: np.ndarray) -> torch.Tensor:
    return torch.tensor(array)


NORMALIZATION = [
    Case(
        "layer_norm",
        {"x": _x},
        lambda x: F.layer_norm(x, (3, 4), _t(_wide_gamma), _t(_wide_beta), 1e-3),
        {"axes": np.array([1, 2]), "gamma": _wide_gamma, "beta": _wide_beta, "epsilon": 1e-3},
    ),
    Case("layer_norm", {"x": _x}, lambda x: F.layer_norm(x, (4,)), {"axes": np.array([-1])}, note="plain"),
    Case(
        "batch_norm",
        {"x": _image},
        lambda x: F.batch_norm(x, _t(_mean), _t(_variance), _t(_gamma), _t(_beta), False, 0, 1e-3),
        {"mean": _mean, "variance": _variance, "gamma": _gamma, "beta": _beta, "epsilon": 1e-3},
        inferred=False,
    ),
    Case(
        "batch_norm",
        {"x": _image},
        lambda x: F.batch_norm(x, _t(_mean), _t(_variance)),
        {"mean": _mean, "variance": _variance},
        note="plain",
        inferred=False,
    ),
    Case(
        "instance_norm",
        {"x": _image},
        lambda x: F.instance_norm(x, weight=_t(_gamma), bias=_t(_beta), eps=1e-3),
        {"gamma": _gamma, "beta": _beta, "epsilon": 1e-3},
        inferred=False,
        half_tolerance=1e-2,  # mean, variance, scale and shift each round
    ),
    Case(
        "l2_norm",
        {"x": _image},
        lambda x: x / torch.sqrt((x * x).sum((1, 2, 3), True) + 1e-3),
        {"epsilon": 1e-3},
    ),
]

_kernel, _grouped, _line, _cube = (
    normal(4, 3, 3, 2),
    normal(6, 1, 2, 2),
    normal(4, 3, 3),
    normal(2, 2, 2, 2, 2),
)
_short = normal(6, 1, 4)


def _conv(x, weight, bias=None, pad=(0, 0, 0, 0), **kwargs):
    return F.conv2d(F.pad(x, pad), _t(weight), bias, **kwargs)


def _pool(op, reference, note, **params) -> Case:
    arrays = {key: np.array(value) if isinstance(value, list) else value for key, value in params.items()}
    return Case(op, {"x": _image}, reference, arrays, note=note, inferred=False)


def _mean_inside(x, kernel, stride, pad):
    total = F.avg_pool2d(F.pad(x, pad), kernel, stride) * math.prod(kernel)
    count = F.avg_pool2d(F.pad(torch.ones_like(x), pad), kernel, stride) * math.prod(kernel)
    return total / count


CONVOLUTION = [
    Case("conv", {"x": _image}, lambda x: _conv(x, _kernel), {"weight": _kernel}, inferred=False),
    Case(
        "conv",
        {"x": _image},
        lambda x: _conv(x, _kernel, pad=(1, 0, 2, 1), stride=(2, 1)),
        {
            "weight": _kernel,
            "pad_type": "custom",
            "pad": np.array([2, 1, 1, 0]),
            "strides": np.array([2, 1]),
        },
        note="custom",
        inferred=False,
    ),
    Case(
        "conv",
        {"x": _image},
        # height 6, stride 2, kernel 3: one row, behind; width 5, stride 2, kernel 2: one column, behind
        lambda x: _conv(x, _kernel, pad=(0, 1, 0, 1), stride=2),
        {"weight": _kernel, "pad_type": "same", "strides": np.array([2, 2])},
        note="same",
        inferred=False,
    ),
    Case(
        "conv",
        {"x": _image},
        lambda x: _conv(x, _kernel, pad=(1, 0, 1, 0), stride=2),
        {"weight": _kernel, "pad_type": "same_lower", "strides": np.array([2, 2])},
        note="same_lower",
        inferred=False,
    ),
    Case(
        "conv",
        {"x": _image},
        lambda x: _conv(x, _grouped, torch.arange(6.0), dilation=(2, 1), groups=3),
        {
            "weight": _grouped,
            "bias": np.arange(6).astype(np.float32),
            "dilations": np.array([2, 1]),
            "groups": 3,
        },
        note="grouped",
        inferred=False,
    ),
    Case(
        "conv",
        {"x": normal(2, 6, 4)},
        lambda x: F.conv1d(x, _t(_short), torch.arange(6.0), groups=6),
        {"weight": _short, "bias": np.arange(6).astype(np.float32), "groups": 6},
        note="step",
        inferred=False,
    ),
    Case(
        "conv",
        {"x": normal(2, 3, 7)},
        lambda x: F.conv1d(x, _t(_line), stride=2),
        {"weight": _line, "strides": np.array([2])},
        note="line",
        inferred=False,
    ),
    Case(
        "conv",
        {"x": normal(1, 2, 3, 4, 3)},
        lambda x: F.conv3d(x, _t(_cube)),
        {"weight": _cube},
        note="cube",
        inferred=False,
    ),
    _pool(
        "max_pool",
        lambda x: F.max_pool2d(x, (3, 2), 2),
        "valid",
        kernel_sizes=[3, 2],
        strides=[2, 2],
        pad_type="valid",
    ),
    _pool(
        "max_pool",
        lambda x: F.max_pool2d(F.pad(x, (1, 0, 0, 2), value=-math.inf), 3, 1),
        "custom",
        kernel_sizes=[3, 3],
        strides=[1, 1],
        pad_type="custom",
        pad=[0, 2, 1, 0],
    ),
    _pool(
        "max_pool",
        lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
        "ceil",
        kernel_sizes=[3, 3],
        strides=[2, 2],
        pad_type="custom",
        pad=[1, 1, 1, 1],
        ceil_mode=True,
    ),
    _pool(
        "avg_pool",
        lambda x: F.avg_pool2d(F.pad(x, (1, 0, 0, 2)), 3, 2),
        "custom",
        kernel_sizes=[3, 3],
        strides=[2, 2],
        pad_type="custom",
        pad=[0, 2, 1, 0],
    ),
    _pool(
        "avg_pool",
        lambda x: _mean_inside(x, (3, 3), 2, (1, 0, 0, 2)),
        "exclude",
        kernel_sizes=[3, 3],
        strides=[2, 2],
        pad_type="custom",
        pad=[0, 2, 1, 0],
        exclude_padding_from_average=True,
    ),
    _pool(
        "avg_pool",
        lambda x: _mean_inside(x, (2, 2), 1, (0, 1, 0, 1)),
        "same",
        kernel_sizes=[2, 2],
        strides=[1, 1],
        pad_type="same",
        exclude_padding_from_average=True,
    ),
    _pool(
        "avg_pool",
        lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
        "ceil",
        kernel_sizes=[3, 3],
        strides=[2, 2],
        pad_type="custom",
        pad=[1, 1, 1, 1],
        ceil_mode=True,
        exclude_padding_from_average=True,
    ),
]
