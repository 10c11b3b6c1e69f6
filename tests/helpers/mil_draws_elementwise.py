"""Random cases of elementwise ops, reductions and normalizations."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tests.helpers.mil_draws import Drawn, Rng, axis_of, draws, floats, ints, numbers, pick, shape

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


# Function of float64, and the interval that operands are drawn from.
UNARY: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float, float]] = {
    "abs": (np.abs, -9, 9),
    "acos": (np.arccos, -0.99, 0.99),
    "asin": (np.arcsin, -0.99, 0.99),
    "atan": (np.arctan, -9, 9),
    "atanh": (np.arctanh, -0.9, 0.9),
    "ceil": (np.ceil, -9, 9),
    "cos": (np.cos, -9, 9),
    "cosh": (np.cosh, -4, 4),
    "erf": (_erf, -3, 3),
    "exp": (np.exp, -4, 4),
    "exp2": (np.exp2, -4, 4),
    "floor": (np.floor, -9, 9),
    "identity": (lambda x: x, -9, 9),
    "relu": (lambda x: np.maximum(x, 0), -9, 9),
    "relu6": (lambda x: np.clip(x, 0, 6), -9, 9),
    "round": (np.round, -9, 9),
    "sigmoid": (_sigmoid, -9, 9),
    "sign": (np.sign, -9, 9),
    "silu": (lambda x: x * _sigmoid(x), -9, 9),
    "sin": (np.sin, -9, 9),
    "sinh": (np.sinh, -4, 4),
    "softplus": (_softplus, -30, 30),
    "softsign": (lambda x: x / (1 + np.abs(x)), -9, 9),
    "sqrt": (np.sqrt, 0, 9),
    "square": (np.square, -9, 9),
    "tan": (np.tan, -1.4, 1.4),
    "tanh": (np.tanh, -4, 4),
}


@draws(*UNARY)
def unary(rng: Rng, op: str) -> Drawn:
    function, low, high = UNARY[op]
    x = floats(rng, shape(rng), low, high)
    if op in ("round", "ceil", "floor", "sign") and rng.random() < 0.5:
        x = np.asarray(np.round(x * 2) / 2, np.float32)  # halves, zeros
    return Drawn({"x": x}, function(x.astype(np.float64)))


@draws("rsqrt", "inverse", "log")
def with_epsilon(rng: Rng, op: str) -> Drawn:
    x = floats(rng, shape(rng), 0.1, 9)
    function = {"rsqrt": lambda y: 1 / np.sqrt(y), "inverse": lambda y: 1 / y, "log": np.log}[op]
    default = {"rsqrt": 1e-12, "inverse": 1e-4, "log": 1e-45}[op]
    if rng.random() < 0.5:
        return Drawn({"x": x}, function(x.astype(np.float64) + default))
    epsilon = np.float32(rng.uniform(0, 0.5))
    return Drawn({"x": x}, function(x.astype(np.float64) + epsilon), {"epsilon": epsilon})


ACTIVATION: dict[str, Callable[..., np.ndarray]] = {
    "clamped_relu": lambda x, a, b: np.minimum(np.where(x >= 0, x, a * x), b),
    "leaky_relu": lambda x, a: np.where(x >= 0, x, a * x),
    "thresholded_relu": lambda x, a: np.where(x >= a, x, 0),
    "elu": lambda x, a: np.where(x > 0, x, a * np.expm1(np.minimum(x, 0))),
    "sigmoid_hard": lambda x, a, b: np.clip(a * x + b, 0, 1),
    "linear_activation": lambda x, a, b: a * x + b,
    "scaled_tanh": lambda x, a, b: a * np.tanh(b * x),
    "threshold": lambda x, a: np.maximum(x, a),
    "clip": lambda x, a, b: np.clip(x, a, b),
}


@draws(*ACTIVATION)
def with_parameters(rng: Rng, op: str) -> Drawn:
    function = ACTIVATION[op]
    values = sorted(np.float32(value) for value in rng.uniform(-1, 2, function.__code__.co_argcount - 1))
    x = floats(rng, shape(rng))
    params = dict(zip(("alpha", "beta"), values, strict=False))
    return Drawn({"x": x}, function(x.astype(np.float64), *values), params)


@draws("gelu")
def gelu(rng: Rng, op: str) -> Drawn:
    x = floats(rng, shape(rng))
    wide = x.astype(np.float64)
    mode = pick(rng, None, "EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")
    if mode == "TANH_APPROXIMATION":
        expected = 0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
    elif mode == "SIGMOID_APPROXIMATION":
        expected = wide * _sigmoid(1.702 * wide)
    else:
        expected = 0.5 * wide * (1 + _erf(wide / np.sqrt(2)))
    return Drawn({"x": x}, expected, {} if mode is None else {"mode": mode})


@draws("prelu", "softplus_parametric")
def by_channel(rng: Rng, op: str) -> Drawn:
    x = floats(rng, shape(rng, 3, 5))
    around = (-1, *[1] * (x.ndim - 2))
    alpha = floats(rng, x.shape[1:2])
    wide, a = x.astype(np.float64), alpha.astype(np.float64).reshape(around)
    if op == "prelu":
        return Drawn({"x": x}, np.where(wide >= 0, wide, a * wide), {"alpha": alpha})
    beta = floats(rng, x.shape[1:2])
    return Drawn({"x": x}, a * _softplus(wide * beta.reshape(around)), {"alpha": alpha, "beta": beta})


def _pair(rng: Rng) -> tuple[list[int], list[int]]:
    """Two shapes that broadcast."""
    whole = shape(rng)
    first, second = ([1 if rng.random() < 0.25 else size for size in whole] for _ in range(2))
    return first[int(rng.integers(0, len(first) + 1)) :] if rng.random() < 0.3 else first, second


def _truncated(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if x.dtype.kind == "i":
        return (np.sign(x) * np.sign(y) * (np.abs(x) // np.abs(y))).astype(np.int32)
    return x / y


BINARY: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "real_div": _truncated,
    "floor_div": np.floor_divide,
    "mod": np.mod,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
}


@draws(*BINARY)
def binary(rng: Rng, op: str) -> Drawn:
    first, second = _pair(rng)
    if rng.random() < 0.5:
        x, y = ints(rng, first), ints(rng, second)
        y = np.where(y == 0, np.int32(3), y) if op in ("real_div", "floor_div", "mod") else y
        return Drawn({"x": x, "y": np.asarray(y, np.int32)}, BINARY[op](x, y))
    # steps of a quarter: equal values come up, and quotients are exact
    x, y = (np.asarray(np.round(floats(rng, sizes) * 4) / 4, np.float32) for sizes in (first, second))
    y = np.asarray(np.where(y == 0, 0.75, y), np.float32)
    return Drawn({"x": x, "y": y}, BINARY[op](x, y))


@draws("pow")
def power(rng: Rng, op: str) -> Drawn:
    first, second = _pair(rng)
    x, y = floats(rng, first, 0.2, 3), floats(rng, second, -2, 2)
    return Drawn({"x": x, "y": y}, np.power(x.astype(np.float64), y))


LOGICAL: dict[str, Callable[..., np.ndarray]] = {
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
}


@draws(*LOGICAL)
def logical(rng: Rng, op: str) -> Drawn:
    first, second = _pair(rng)
    x, y = rng.random(first) < 0.5, rng.random(second) < 0.5
    return Drawn({"x": np.asarray(x), "y": np.asarray(y)}, LOGICAL[op](x, y))


@draws("logical_not")
def logical_not(rng: Rng, op: str) -> Drawn:
    x = np.asarray(rng.random(shape(rng)) < 0.5)
    return Drawn({"x": x}, ~x)


@draws("select")
def select(rng: Rng, op: str) -> Drawn:
    first, second = _pair(rng)
    a, b = floats(rng, first), floats(rng, second)
    cond = np.asarray(rng.random(pick(rng, [], np.broadcast_shapes(a.shape, b.shape))) < 0.5)
    return Drawn({"cond": cond, "a": a, "b": b}, np.where(cond, a, b))


@draws("cast")
def cast(rng: Rng, op: str) -> Drawn:
    x = numbers(rng, shape(rng)) * np.asarray(pick(rng, 1, 3)).astype(np.int32)
    x = np.asarray(x, np.float32 if x.dtype.kind == "f" else np.int32)
    name, kind = pick(rng, ("int32", np.int32), ("fp32", np.float32), ("bool", np.bool_), ("int16", np.int16))
    return Drawn(
        {"x": x},
        np.trunc(x).astype(kind) if kind in (np.int32, np.int16) else x.astype(kind),
        {"dtype": name},
    )


REDUCTION: dict[str, Callable[..., np.ndarray]] = {
    "reduce_sum": np.sum,
    "reduce_mean": np.mean,
    "reduce_max": np.max,
    "reduce_min": np.min,
    "reduce_prod": np.prod,
    "reduce_sum_square": lambda x, **how: np.sum(x * x, **how),
    "reduce_l1_norm": lambda x, **how: np.sum(np.abs(x), **how),
    "reduce_l2_norm": lambda x, **how: np.sqrt(np.sum(x * x, **how)),
    "reduce_log_sum": lambda x, **how: np.log(np.sum(x, **how)),
    "reduce_log_sum_exp": lambda x, **how: np.log(np.sum(np.exp(x), **how)),
}


@draws(*REDUCTION)
def reduction(rng: Rng, op: str) -> Drawn:
    x = floats(rng, shape(rng, 1), 0.1, 3)
    whole = op in ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod") and rng.random() < 0.4
    if whole:
        x = ints(rng, x.shape, -3, 4)
    axes = None
    if rng.random() < 0.8:
        chosen = rng.permutation(x.ndim)[: rng.integers(1, x.ndim + 1)]
        axes = [int(axis - x.ndim if rng.random() < 0.4 else axis) for axis in chosen]
    keep = bool(rng.random() < 0.5)
    how = {"axis": None if axes is None else tuple(axes), "keepdims": keep}
    if op in ("reduce_max", "reduce_min"):  # of nothing: the neutral element
        limits = (
            (-np.inf, np.inf) if x.dtype.kind == "f" else (np.iinfo(np.int32).min, np.iinfo(np.int32).max)
        )
        how["initial"] = limits[0] if op == "reduce_max" else limits[1]
    with np.errstate(all="ignore"):
        expected = REDUCTION[op](x if whole else x.astype(np.float64), **how)
    params = {"keep_dims": keep} if axes is None else {"keep_dims": keep, "axes": np.array(axes, np.int32)}
    return Drawn({"x": x}, expected.astype(x.dtype), params)


@draws("reduce_argmax", "reduce_argmin")
def arg_reduction(rng: Rng, op: str) -> Drawn:
    x = floats(rng, shape(rng, 1, 4, 1))
    axis, keep = axis_of(rng, x.ndim), bool(rng.random() < 0.5)
    found = (np.argmax if op == "reduce_argmax" else np.argmin)(x, axis)
    found = np.expand_dims(found, axis) if keep else found
    return Drawn({"x": x}, found.astype(np.int32), {"axis": axis, "keep_dims": keep})


@draws("cumsum")
def cumsum(rng: Rng, op: str) -> Drawn:
    x = floats(rng, shape(rng, 1))
    axis, exclusive, backwards = axis_of(rng, x.ndim), bool(rng.random() < 0.5), bool(rng.random() < 0.5)
    y = np.flip(x, axis) if backwards else x
    total = np.cumsum(y.astype(np.float64), axis)
    total = total - y if exclusive else total
    expected = np.flip(total, axis) if backwards else total
    return Drawn({"x": x}, expected, {"axis": axis, "exclusive": exclusive, "reverse": backwards})


@draws("softmax")
def softmax(rng: Rng, op: str) -> Drawn:
    x = floats(rng, shape(rng, 1))
    axis = axis_of(rng, x.ndim)
    shifted = np.exp(x.astype(np.float64))
    return Drawn({"x": x}, shifted / shifted.sum(axis, keepdims=True), {"axis": axis})


@draws("layer_norm")
def layer_norm(rng: Rng, op: str) -> Drawn:
    x = floats(rng, shape(rng, 1, 4, 1))
    axes = sorted(rng.permutation(x.ndim)[: rng.integers(1, x.ndim + 1)].tolist())
    wide, epsilon = x.astype(np.float64), np.float32(rng.uniform(0.01, 0.1))
    normal = wide - wide.mean(tuple(axes), keepdims=True)
    normal /= np.sqrt(wide.var(tuple(axes), keepdims=True) + epsilon)
    params = {"axes": np.array([axis - x.ndim if rng.random() < 0.4 else axis for axis in axes], np.int32)}
    sizes = [x.shape[axis] for axis in axes]
    around = [x.shape[axis] if axis in axes else 1 for axis in range(x.ndim)]
    for name in ("gamma", "beta"):
        if rng.random() < 0.5:
            value = floats(rng, sizes)
            params[name] = value
            normal = normal * value.reshape(around) if name == "gamma" else normal + value.reshape(around)
    return Drawn({"x": x}, normal, {**params, "epsilon": epsilon})


@draws("batch_norm", "instance_norm")
def channel_norm(rng: Rng, op: str) -> Drawn:
    x = floats(rng, shape(rng, 3, 5, 1))
    wide, around = x.astype(np.float64), (1, -1, *[1] * (x.ndim - 2))
    epsilon = np.float32(rng.uniform(0.01, 0.1))
    params: dict[str, np.ndarray] = {}
    if op == "batch_norm":
        params = {"mean": floats(rng, x.shape[1:2]), "variance": floats(rng, x.shape[1:2], 0.1, 2)}
        mean, variance = (params[name].astype(np.float64).reshape(around) for name in ("mean", "variance"))
    else:
        spatial = tuple(range(2, x.ndim))
        mean, variance = wide.mean(spatial, keepdims=True), wide.var(spatial, keepdims=True)
    result = (wide - mean) / np.sqrt(variance + epsilon)
    if rng.random() < 0.6:
        params |= {"gamma": floats(rng, x.shape[1:2]), "beta": floats(rng, x.shape[1:2])}
        result = result * params["gamma"].reshape(around) + params["beta"].reshape(around)
    return Drawn({"x": x}, result, {**params, "epsilon": epsilon})


@draws("l2_norm")
def l2_norm(rng: Rng, op: str) -> Drawn:
    x = floats(rng, shape(rng, 3, 5, 1))
    wide, epsilon = x.astype(np.float64), np.float32(rng.uniform(0.01, 0.1))
    scale = np.sqrt((wide * wide).sum((-3, -2, -1), keepdims=True) + epsilon)
    return Drawn({"x": x}, wide / scale, {"epsilon": epsilon})


@draws("local_response_norm")
def local_response_norm(rng: Rng, op: str) -> Drawn:
    x = floats(rng, shape(rng, 3, 4, 1, 5))
    size, alpha, beta, k = int(rng.integers(1, 6)), *(np.float32(rng.uniform(0.1, 1)) for _ in range(3))
    axis = 0 if x.ndim == 3 else 1
    wide = np.moveaxis(x.astype(np.float64), axis, 0)
    result = np.empty_like(wide)
    for channel in range(len(wide)):
        near = wide[max(channel - size // 2, 0) : channel + (size - 1) // 2 + 1]
        result[channel] = wide[channel] / (k + alpha / size * (near**2).sum(0)) ** beta
    params = {"size": size, "alpha": alpha, "beta": beta, "k": k}
    return Drawn({"x": x}, np.moveaxis(result, 0, axis), params)
