"""Elementwise ops: arithmetic, comparison, activation."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from tests.helpers.mil_cases import Case, integers, normal, positive, unit

_x, _y = normal(2, 3, 4), normal(3, 1)
_i, _j = integers(-20, 20, 2, 3), integers(1, 6, 3)
_a, _b = integers(0, 2, 2, 3), integers(0, 2, 3)
_TIES = np.array([[-2.5, -1.5, -0.5], [0.5, 1.5, 2.5]], np.float32)


def _unary(op: str, reference, data=_x, **kwargs) -> Case:
    return Case(op, {"x": data}, lambda x: reference(x), **kwargs)


def _binary(op: str, reference, note: str = "", **kwargs) -> Case:
    return Case(op, {"x": _x, "y": _y}, lambda x, y: reference(x, y), note=note, **kwargs)


def _whole(op: str, reference, **kwargs) -> Case:
    return Case(op, {"x": _i, "y": _j}, lambda x, y: reference(x, y), note="int", **kwargs)


ARITHMETIC = [
    _binary("add", torch.add),
    _whole("add", torch.add),
    _binary("sub", torch.sub),
    _whole("sub", torch.sub),
    _binary("mul", torch.mul),
    _whole("mul", torch.mul),
    _binary("real_div", torch.div),
    # coremltools infers a fraction for integers although it declares an integer: torch is the reference
    _whole("real_div", lambda x, y: (x.double() / y).trunc().int(), inferred=False),
    # a quotient next to an integer may round to either side of it: halves keep it exact
    Case("floor_div", {"x": _TIES, "y": np.full((3,), 0.75, np.float32)}, lambda x, y: torch.floor(x / y)),
    _whole("floor_div", lambda x, y: torch.floor(x.double() / y).int()),
    Case("mod", {"x": _TIES, "y": np.full((3,), 2.0, np.float32)}, lambda x, y: x - y * torch.floor(x / y)),
    _whole("mod", lambda x, y: (x - y * torch.floor(x.double() / y)).int()),
    Case("pow", {"x": positive(2, 3), "y": normal(3)}, lambda x, y: x**y),
    Case("pow", {"x": normal(2, 3)}, lambda x: x * x, {"y": 2.0}, note="square"),
    _binary("maximum", lambda x, y: torch.where(x > y, x, y)),
    _binary("minimum", lambda x, y: torch.where(x < y, x, y)),
    _whole("minimum", lambda x, y: torch.where(x < y, x, y)),
    _unary("abs", torch.abs),
    _unary("sign", torch.sign),
    _unary("square", lambda x: x * x),
    _unary("sqrt", torch.sqrt, positive(2, 3)),
    _unary("rsqrt", lambda x: 1 / torch.sqrt(x), positive(2, 3)),
    Case("rsqrt", {"x": positive(2, 3)}, lambda x: 1 / torch.sqrt(x + 0.5), {"epsilon": 0.5}, note="epsilon"),
    Case("inverse", {"x": positive(2, 3)}, lambda x: 1 / (x + 0.25), {"epsilon": 0.25}),
    _unary("exp", torch.exp),
    _unary("exp2", lambda x: torch.pow(2.0, x)),
    _unary("log", torch.log, positive(2, 3)),
    Case("log", {"x": positive(2, 3)}, lambda x: torch.log(x + 0.5), {"epsilon": 0.5}, note="epsilon"),
    _unary("erf", torch.erf),
    *[_unary(name, getattr(torch, name)) for name in ("sin", "cos", "tanh", "sinh", "cosh", "atan")],
    *[_unary(name, getattr(torch, name), unit(2, 3)) for name in ("tan", "asin", "acos", "atanh")],
    *[_unary(name, getattr(torch, name), _TIES) for name in ("ceil", "floor", "round")],
    Case("clip", {"x": _x}, lambda x: torch.clamp(x, -0.5, 0.75), {"alpha": -0.5, "beta": 0.75}),
    Case("threshold", {"x": _x}, lambda x: torch.maximum(x, torch.tensor(0.25)), {"alpha": 0.25}),
    Case("identity", {"x": _x}, lambda x: x),
    Case("cast", {"x": _TIES}, lambda x: x.int(), {"dtype": "int32"}, note="to_int"),
    Case("cast", {"x": _i}, lambda x: x.float(), {"dtype": "fp32"}, note="to_float"),
    Case("cast", {"x": _i}, lambda x: x != 0, {"dtype": "bool"}, note="to_bool"),
    Case("cast", {"x": _j}, lambda x: x, {"dtype": "uint16"}, note="to_uint16"),
    Case("cast", {"x": _i}, lambda x: x, {"dtype": "int8"}, note="to_int8"),
]

COMPARISON = [
    *[
        Case(name, {"x": _i, "y": _j}, lambda x, y, name=name: _COMPARE[name](x, y), note=note)
        for note in ("int",)
        for name in ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal")
    ],
    *[_binary(name, lambda x, y, name=name: _COMPARE[name](x, y)) for name in ("less", "greater_equal")],
    *[
        Case(
            name, {"x": _a, "y": _b}, lambda x, y, name=name: _LOGIC[name](x != 0, y != 0), boolean=("x", "y")
        )
        for name in ("logical_and", "logical_or", "logical_xor")
    ],
    Case("logical_not", {"x": _a}, lambda x: x == 0, boolean=("x",)),
    Case(
        "select",
        {"cond": _a, "a": normal(2, 3), "b": normal(3)},
        lambda cond, a, b: torch.where(cond != 0, a, b),
        boolean=("cond",),
    ),
]
_COMPARE = {
    "equal": torch.eq,
    "not_equal": torch.ne,
    "less": torch.lt,
    "less_equal": torch.le,
    "greater": torch.gt,
    "greater_equal": torch.ge,
}
_LOGIC = {
    "logical_and": torch.bitwise_and,
    "logical_or": torch.bitwise_or,
    "logical_xor": torch.bitwise_xor,
}

_image = normal(2, 3, 4, 5)
_slopes = np.array([0.1, 0.25, 0.5], np.float32)

ACTIVATION = [
    _unary("relu", F.relu),
    _unary("relu6", F.relu6, normal(2, 3) * 6),
    _unary("silu", F.silu, inferred=False),
    _unary("sigmoid", torch.sigmoid),
    _unary("softplus", F.softplus),
    _unary("softsign", F.softsign),
    *[
        Case("gelu", {"x": _x}, reference, {"mode": mode}, note=mode.lower())
        for mode, reference in (
            ("EXACT", F.gelu),
            ("TANH_APPROXIMATION", lambda x: F.gelu(x, approximate="tanh")),
            ("SIGMOID_APPROXIMATION", lambda x: x / (1 + torch.exp(-1.702 * x))),
        )
    ],
    Case("gelu", {"x": _x}, F.gelu, note="default"),
    Case("leaky_relu", {"x": _x}, lambda x: F.leaky_relu(x, 0.25), {"alpha": 0.25}),
    Case("elu", {"x": _x}, lambda x: F.elu(x, 0.5), {"alpha": 0.5}),
    Case("prelu", {"x": _image}, lambda x: F.prelu(x, torch.tensor(_slopes)), {"alpha": _slopes}),
    Case("thresholded_relu", {"x": _x}, lambda x: F.threshold(x, 0.25, 0.0), {"alpha": 0.25}),
    Case(
        "clamped_relu",
        {"x": _x},
        lambda x: F.leaky_relu(x, 0.25).clamp(max=0.5),
        {"alpha": 0.25, "beta": 0.5},
    ),
    Case("sigmoid_hard", {"x": _x}, lambda x: (0.5 * x + 0.25).clamp(0, 1), {"alpha": 0.5, "beta": 0.25}),
    Case("linear_activation", {"x": _x}, lambda x: 2.0 * x + 0.5, {"alpha": 2.0, "beta": 0.5}),
    Case("scaled_tanh", {"x": _x}, lambda x: 2 * torch.tanh(0.5 * x), {"alpha": 2.0, "beta": 0.5}),
    *[
        Case(
            "softmax",
            {"x": _x},
            lambda x, axis=axis: F.softmax(x, axis),
            {"axis": axis},
            note=f"axis{axis % 3}",
        )
        for axis in (-1, 0, 1)
    ],
]
