"""Elementwise arithmetic, with the broadcasting of numpy."""

from __future__ import annotations

import torch
from torch import Tensor

from converters.coreml.read.ops.registry import Call, UnsupportedForm, op
from converters.coreml.read.values import DTYPES

_CASTS = {
    "fp16": "float16",
    "fp32": "float32",
    **{name: name for name in ("bool", "int8", "uint8", "int16", "uint16", "int32")},
}
_DTYPE_OF_NAME = {dtype.name: dtype for dtype in DTYPES.values()}


@op("add")
def add(x: Tensor, y: Tensor) -> Tensor:
    """Sum x + y."""
    return x + y


@op("sub")
def sub(x: Tensor, y: Tensor) -> Tensor:
    """Difference x - y."""
    return x - y


@op("mul")
def mul(x: Tensor, y: Tensor) -> Tensor:
    """Product x * y."""
    return x * y


@op("real_div")
def real_div(x: Tensor, y: Tensor) -> Tensor:
    """Quotient x / y; truncated towards zero, and integer, when both operands are."""
    if x.is_floating_point() or y.is_floating_point():
        return x / y
    return torch.div(x, y, rounding_mode="trunc")


@op("floor_div")
def floor_div(x: Tensor, y: Tensor) -> Tensor:
    """Quotient rounded down."""
    return torch.div(x, y, rounding_mode="floor")


@op("mod")
def mod(x: Tensor, y: Tensor) -> Tensor:
    """Remainder with the sign of the divisor, as in Python."""
    return torch.remainder(x, y)


@op("pow")
def power(x: Tensor, y: Tensor) -> Tensor:
    """Power x ** y."""
    return torch.pow(x, y)


@op("maximum")
def maximum(x: Tensor, y: Tensor) -> Tensor:
    """Larger of x and y."""
    return torch.maximum(x, y)


@op("minimum")
def minimum(x: Tensor, y: Tensor) -> Tensor:
    """Smaller of x and y."""
    return torch.minimum(x, y)


@op("abs")
def absolute(x: Tensor) -> Tensor:
    """Magnitude."""
    return x.abs()


@op("sign")
def sign(x: Tensor) -> Tensor:
    """Sign: -1, 0 or 1."""
    return x.sign()


@op("square")
def square(x: Tensor) -> Tensor:
    """Square."""
    return x * x


@op("sqrt")
def sqrt(x: Tensor) -> Tensor:
    """Square root."""
    return x.sqrt()


@op("rsqrt")
def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    """Reciprocal square root of x + epsilon."""
    return (x + epsilon).rsqrt_()


@op("inverse")
def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    """Reciprocal of x + epsilon."""
    return (x + epsilon).reciprocal_()


@op("exp")
def exp(x: Tensor) -> Tensor:
    """Exponential."""
    return x.exp()


@op("exp2")
def exp2(x: Tensor) -> Tensor:
    """Power of two."""
    return torch.exp2(x)


@op("log")
def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    """Natural logarithm of x + epsilon."""
    return (x + epsilon).log_()


@op("erf")
def erf(x: Tensor) -> Tensor:
    """Gauss error function."""
    return x.erf()


@op("sin")
def sin(x: Tensor) -> Tensor:
    """Sine."""
    return x.sin()


@op("cos")
def cos(x: Tensor) -> Tensor:
    """Cosine."""
    return x.cos()


@op("tan")
def tan(x: Tensor) -> Tensor:
    """Tangent."""
    return x.tan()


@op("asin")
def asin(x: Tensor) -> Tensor:
    """Inverse sine."""
    return x.asin()


@op("acos")
def acos(x: Tensor) -> Tensor:
    """Inverse cosine."""
    return x.acos()


@op("atan")
def atan(x: Tensor) -> Tensor:
    """Inverse tangent."""
    return x.atan()


@op("sinh")
def sinh(x: Tensor) -> Tensor:
    """Hyperbolic sine."""
    return x.sinh()


@op("cosh")
def cosh(x: Tensor) -> Tensor:
    """Hyperbolic cosine."""
    return x.cosh()


@op("tanh")
def tanh(x: Tensor) -> Tensor:
    """Hyperbolic tangent."""
    return x.tanh()


@op("atanh")
def atanh(x: Tensor) -> Tensor:
    """Inverse hyperbolic tangent."""
    return x.atanh()


@op("ceil")
def ceil(x: Tensor) -> Tensor:
    """Smallest integer not below x."""
    return x.ceil()


@op("floor")
def floor(x: Tensor) -> Tensor:
    """Largest integer not above x."""
    return x.floor()


@op("round")
def round_half_even(x: Tensor) -> Tensor:
    """Nearest integer; halves go to the even one."""
    return x.round()


@op("clip")
def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    """Clamp x to [alpha, beta]."""
    return x.clamp(alpha, beta)


@op("threshold")
def threshold(x: Tensor, alpha: float) -> Tensor:
    """Clamp x from below."""
    return x.clamp(min=alpha)


@op("identity", moves=True)
def identity(x: Tensor) -> Tensor:
    """Pass x through."""
    return x


@op("cast")
def cast(x: Tensor, dtype: str, call: Call) -> Tensor:
    """Convert to another type; towards zero from floating point to integer."""
    target = _DTYPE_OF_NAME.get(_CASTS.get(dtype, ""))
    if target is None:
        raise UnsupportedForm(f"dtype {dtype!r}")
    return x.to(call.precision.carrier(target), copy=True)
