"""Standard operators that decode weights, in numpy (the semantics of onnx/docs/Operators.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.onnx.read.tensors import DTYPES

__all__ = ["OPERATORS", "result_size"]

Array = NDArray[Any]

_ROWS = 1 << 20  # indices that are gathered at a time: numpy widens them to int64


def result_size(op: str, arguments: Sequence[Array | None], attributes: Mapping[str, Any]) -> int:
    """Elements of the largest result of an operator, before it is computed."""
    sizes = [0 if argument is None else argument.size for argument in arguments]
    first = arguments[0] if arguments else None
    if op == "Gather" and first is not None and first.ndim:
        return int(sizes[1] * (first.size // max(first.shape[attributes.get("axis", 0)], 1)))
    if op == "GatherND" and first is not None:
        return sizes[1] * max(first.size, 1)
    if op == "Expand":
        shape = arguments[-1]
        known = [] if shape is None else [abs(int(size)) for size in shape.reshape(-1)[:16]]
        return math.prod(known) * max(sizes[0], 1)
    if op in _ARITHMETIC:
        shapes = [argument.shape for argument in arguments if argument is not None]
        return int(math.prod(np.broadcast_shapes(*shapes)))
    return sum(sizes)


def _gather(data: Array, indices: Array, axis: int = 0) -> Array:
    axis %= data.ndim
    if axis:
        return np.take(data, indices, axis)
    flat = indices.reshape(-1)
    result: Array = np.empty((flat.size, *data.shape[1:]), data.dtype)
    step = max(_ROWS // max(math.prod(data.shape[1:]), 1), 1)
    for start in range(0, flat.size, step):
        result[start : start + step] = data[flat[start : start + step].astype(np.int64)]
    return result.reshape(*indices.shape, *data.shape[1:])


def _gather_elements(data: Array, indices: Array, axis: int = 0) -> Array:
    axis %= data.ndim
    if indices.size and not -data.shape[axis] <= indices.min() <= indices.max() < data.shape[axis]:
        raise IndexError(f"an index is beyond the {data.shape[axis]} entries of a table")
    if axis != data.ndim - 1 or data.shape[:-1] != indices.shape[:-1]:
        return np.take_along_axis(data, indices.astype(np.int64), axis)
    result = np.empty(indices.shape, data.dtype)
    rows, tables = indices.reshape(-1, indices.shape[-1]), data.reshape(-1, data.shape[-1])
    for row, table, out in zip(rows, tables, result.reshape(rows.shape), strict=True):
        out[:] = table[row.astype(np.int64)]
    return result


def _gather_nd(data: Array, indices: Array, batch_dims: int = 0) -> Array:
    if batch_dims:
        raise ValueError("batch_dims are not known here")
    wide = indices.astype(np.int64)
    found: Array = data[tuple(np.moveaxis(wide, -1, 0))]
    return found


def _reshape(data: Array, shape: Array, allowzero: int = 0) -> Array:
    sizes = [int(size) for size in shape]
    if not allowzero:
        sizes = [data.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return data.reshape(sizes)


def _slice(
    data: Array, starts: Array, ends: Array, axes: Array | None = None, steps: Array | None = None
) -> Array:
    chosen = [slice(None)] * data.ndim
    places = range(len(starts)) if axes is None else [int(axis) for axis in axes]
    strides = [1] * len(starts) if steps is None else [int(step) for step in steps]
    for axis, start, end, step in zip(places, starts, ends, strides, strict=True):
        chosen[axis] = slice(int(start), int(end), step)
    return data[tuple(chosen)]


def _split(
    data: Array, split: Array | None = None, axis: int = 0, num_outputs: int | None = None
) -> tuple[Array, ...]:
    if split is None:
        raise ValueError("Split without sizes is not known here")
    if int(split.sum()) != data.shape[axis] or (split < 0).any() or len(split) > 1024:
        raise ValueError(f"sizes {split[:8].tolist()} do not add up to {data.shape[axis]}")
    return tuple(np.split(data, np.cumsum(split)[:-1], axis))


def _squeeze(data: Array, axes: Array | None = None) -> Array:
    return np.squeeze(data, None if axes is None else tuple(int(axis) for axis in axes))


def _constant(**attributes: Any) -> Array:
    ((key, value),) = attributes.items()
    if key == "value":
        return np.asarray(value)
    return np.asarray(value, np.int64 if key in ("value_int", "value_ints") else np.float32)


def _dequantize(
    data: Array, scale: Array, zero_point: Array | None = None, axis: int = 1, block_size: int = 0
) -> Array:
    centred = data.astype(np.float32) - (
        0 if zero_point is None else _blocks(zero_point, data, axis, block_size)
    )
    return (centred * _blocks(scale, data, axis, block_size).astype(np.float32)).astype(scale.dtype)


def _blocks(parameter: Array, data: Array, axis: int, block_size: int) -> Array:
    """Spread a scale or zero point over the values that share it."""
    if parameter.ndim == 0:
        return parameter
    if not block_size:
        shape = [1] * data.ndim
        shape[axis] = -1
        return parameter.reshape(shape)
    if block_size < 0 or parameter.shape[axis] * block_size >= data.shape[axis] + block_size:
        raise ValueError(f"blocks of {block_size} do not fit")
    return np.take(np.repeat(parameter, block_size, axis), np.arange(data.shape[axis]), axis)


def _divide(left: Array, right: Array) -> Array:
    if left.dtype.kind == "f":
        return left / right
    if not right.all():
        raise ZeroDivisionError("division by zero")
    return left // right if left.dtype.kind == "u" else np.trunc(left / right).astype(left.dtype)


def _shift(left: Array, right: Array, direction: bytes) -> Array:
    return left << right if direction == b"LEFT" else left >> right


_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "BitShift": _shift,
    "BitwiseAnd": np.bitwise_and,
    "BitwiseOr": np.bitwise_or,
    "Div": _divide,
    "Mod": lambda left, right, fmod=0: np.fmod(left, right) if fmod else np.mod(left, right),
    "LessOrEqual": np.less_equal,
    "Mul": np.multiply,
    "Sub": np.subtract,
}

OPERATORS: dict[str, Callable[..., Any]] = {
    **_ARITHMETIC,
    "Cast": lambda data, to, saturate=1: data.astype(DTYPES[to]),
    "Concat": lambda *parts, axis: np.concatenate(parts, axis),
    "Constant": _constant,
    "DequantizeLinear": _dequantize,
    "Expand": lambda data, shape: np.broadcast_to(
        data, np.broadcast_shapes(data.shape, tuple(map(int, shape)))
    ),
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Identity": lambda data: data,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": lambda data, perm=None: np.transpose(data, perm),
    "Unsqueeze": lambda data, axes: np.expand_dims(data, tuple(int(axis) for axis in axes)),
}
"""By operator; called with the inputs in order and the attributes by name."""
