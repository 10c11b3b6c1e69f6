"""Running a decoder on names instead of numbers: each torch function that it calls becomes nodes.

The decoder of `edkm_export.decoder` is a plain PyTorch module, and F.linear, torch.cat and the rest hand over to
`Value` through PyTorch's override protocol. Parameters are never touched, so the module may lie on the meta device:
no weight is decoded, and a graph is made in a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import EllipsisType
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from converters.onnx.backend import load_onnx
from converters.onnx.write.builder import GraphBuilder
from edkm_export.decoder.projections import linears
from edkm_export.errors import ConversionError

__all__ = ["END", "Dimension", "Tracer", "Value", "WeightForms", "half_table"]

Dimension: TypeAlias = "int | str"
"""A size, or the name of one that is open."""

END = np.iinfo(np.int64).max
"""Of an axis, for Slice."""

Number: TypeAlias = float  # inside of `Value` that name is a method


class WeightForms(Protocol):
    """How parameters take part in a graph; see `profiles`.

    Attributes:
        contrib: operators of onnxruntime's own may be used.
    """

    contrib: bool

    def linear(self, x: str, name: str) -> str:
        """Multiply x [batch, new, in] with a weight [out, in]: [batch, new, out]."""
        ...

    def linears(self, x: str, names: Sequence[str]) -> list[str]:
        """Multiply x [batch, new, in] with several weights."""
        ...

    def embedding(self, ids: str, name: str) -> str:
        """Rows of a weight: int64 [batch, new] -> [batch, new, columns]."""
        ...

    def vector(self, name: str, *, wide: bool = False) -> str:
        """A dense parameter, in the dtype of activations, or in float32."""
        ...

    def kernel(self, name: str) -> str:
        """The weight of a convolution, in the dtype of activations."""
        ...


class Tracer:
    """What all values of one graph share.

    Args:
        graph: receives the nodes.
        weights: the forms of parameters.
        parameters: {id of a module's parameter: its name}.
        dtype: of activations, float32 or float16.
    """

    def __init__(
        self, graph: GraphBuilder, weights: WeightForms, parameters: Mapping[int, str], dtype: torch.dtype
    ) -> None:
        self.graph, self.weights, self.parameters, self.dtype = graph, weights, parameters, dtype

    def emit(
        self, op: str, *inputs: str, shape: Sequence[Dimension], dtype: torch.dtype, **attributes: Any
    ) -> Value:
        """Append a node with one result of known shape."""
        return Value(self, self.graph.node(op, *inputs, **attributes), tuple(shape), dtype)

    def constant(self, number: float, dtype: torch.dtype) -> str:
        """Name a scalar."""
        return self.graph.constant(np.asarray(number, _NUMPY[dtype]))

    def onnx_type(self, dtype: torch.dtype) -> int:
        """TensorProto type."""
        types = load_onnx().TensorProto
        return {  # type: ignore[no-any-return]
            torch.float32: types.FLOAT,
            torch.float16: types.FLOAT16,
            torch.int64: types.INT64,
            torch.int8: types.INT8,
            torch.bool: types.BOOL,
        }[dtype]


_NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64, torch.bool: np.bool_}


class Value:
    """A value of the graph, with the part of the tensor interface that decoders use.

    Attributes:
        tracer: of its graph.
        name: in the graph.
        shape: sizes; open ones by name.
        dtype: of its elements.
        terms: names of what it is the sum of, when both have its shape.
    """

    def __init__(self, tracer: Tracer, name: str, shape: tuple[Dimension, ...], dtype: torch.dtype) -> None:
        self.tracer, self.name, self.shape, self.dtype = tracer, name, shape, dtype
        self.terms: tuple[str, str] | None = None
        self._shared: tuple[Value, int] | None = None  # heads that repeat those of another value, how often

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        form = _FUNCTIONS.get(function)
        if form is None:
            name = getattr(function, "__name__", str(function))
            raise ConversionError(f"the decoder calls torch's {name}, for which there is no ONNX form here.")
        return form(*args, **(kwargs or {}))

    # arithmetic

    def __add__(self, other: Value | Number) -> Value:
        made = self._binary("Add", other)
        if isinstance(other, Value) and self.shape == other.shape:
            made.terms = self.name, other.name
        return made

    def __sub__(self, other: Value | Number) -> Value:
        return self._binary("Sub", other)

    def __rsub__(self, other: Number) -> Value:
        name = self.tracer.constant(other, self.dtype)
        return self.tracer.emit("Sub", name, self.name, shape=self.shape, dtype=self.dtype)

    def __mul__(self, other: Value | Number | torch.nn.Parameter) -> Value:
        return self._binary("Mul", other)

    def __truediv__(self, other: Value | Number) -> Value:
        return self._binary("Div", other)

    __radd__, __rmul__ = __add__, __mul__

    def __gt__(self, other: Value | Number) -> Value:
        return self._binary("Greater", other, torch.bool)

    def __le__(self, other: Value | Number) -> Value:
        return self._binary("LessOrEqual", other, torch.bool)

    def __neg__(self) -> Value:
        return self._unary("Neg")

    def __matmul__(self, other: Value) -> Value:
        leading = _broadcast(self.shape[:-2], other.shape[:-2])
        shape = (*leading, self.shape[-2], other.shape[-1])
        return self.tracer.emit("MatMul", self.name, other.name, shape=shape, dtype=self.dtype)

    def minimum(self, other: Value) -> Value:
        """The smaller one, element by element."""
        return self._binary("Min", other)

    def abs(self) -> Value:
        """Magnitude."""
        return self._unary("Abs")

    def round(self) -> Value:
        """To the nearest integer, ties to even."""
        return self._unary("Round")

    def exp(self) -> Value:
        """Exponential."""
        return self._unary("Exp")

    def square(self) -> Value:
        """Product with itself."""
        return self * self

    def eq(self, other: Value | Number) -> Value:
        """Whether they are equal, element by element."""
        return self._binary("Equal", other, torch.bool)

    def clamp(self, *, min: Number | None = None, max: Number | None = None) -> Value:
        """Bound from one side."""
        assert (min is None) != (max is None), "one bound"
        return self._binary("Min", max) if max is not None else self._binary("Max", min or 0)

    def amax(self, dim: int, keepdim: bool) -> Value:
        """The largest along an axis, which stays."""
        return self._reduced("ReduceMax", dim, keepdim)

    def sum(self, dim: int, keepdim: bool) -> Value:
        """The sum along an axis, which stays."""
        return self._reduced("ReduceSum", dim, keepdim)

    def tanh(self) -> Value:
        """Hyperbolic tangent."""
        return self._unary("Tanh")

    def softmax(self, dim: int) -> Value:
        """Softmax along an axis."""
        return self.tracer.emit("Softmax", self.name, shape=self.shape, dtype=self.dtype, axis=dim)

    def to(self, dtype: torch.dtype) -> Value:
        """Cast."""
        if dtype == self.dtype:
            return self
        to = self.tracer.onnx_type(dtype)
        return self.tracer.emit("Cast", self.name, shape=self.shape, dtype=dtype, to=to)

    def float(self) -> Value:
        """Cast to the dtype of activations: float32 where the decoder says so, as numbers are small there."""
        return self.to(self.tracer.dtype)

    # shape

    def reshape(self, *sizes: Any) -> Value:
        """Reshape; an open size keeps its axis, or is the only one that moves."""
        target = list(sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes)
        shape = [
            0 if axis < len(self.shape) and isinstance(size, str) and size == self.shape[axis] else size
            for axis, size in enumerate(target)
        ]
        moved = [size for size in shape if isinstance(size, str)]
        assert len(moved) + shape.count(-1) <= 1, f"{self.shape} -> {target}: more than one open size moves"
        numbers = [-1 if isinstance(size, str) else size for size in shape]
        if -1 in target:
            known = math.prod(size for size in target if isinstance(size, int) and size > 0)
            own = math.prod(size for size in self.shape if isinstance(size, int))
            target[target.index(-1)] = own // known
        made = self.tracer.emit(
            "Reshape", self.name, self.tracer.graph.integers(*numbers), shape=target, dtype=self.dtype
        )
        if self._shared is not None and len(self.shape) == len(target) + 1:
            made._shared = self._shared  # expanded heads, now side by side
        return made

    view = reshape

    def transpose(self, first: int, second: int) -> Value:
        """Exchange two axes."""
        order = list(range(len(self.shape)))
        order[first], order[second] = order[second], order[first]
        shape = [self.shape[axis] for axis in order]
        return self.tracer.emit("Transpose", self.name, shape=shape, dtype=self.dtype, perm=order)

    def unsqueeze(self, axis: int) -> Value:
        """Insert an axis of size 1."""
        shape = list(self.shape)
        axis = axis % (len(shape) + 1)
        shape.insert(axis, 1)
        axes = self.tracer.graph.integers(axis)
        made = self.tracer.emit("Unsqueeze", self.name, axes, shape=shape, dtype=self.dtype)
        if axis == 2 and len(self.shape) == 4:
            made._shared = (self, 1)
        return made

    def expand(self, *sizes: Dimension) -> Value:
        """Repeat axes of size 1."""
        times = [
            size if own == 1 and isinstance(size, int) else 1
            for own, size in zip(self.shape, sizes, strict=True)
        ]
        made = self.tracer.emit(
            "Expand", self.name, self.tracer.graph.integers(*times), shape=sizes, dtype=self.dtype
        )
        if self._shared is not None and len(times) == 5:
            made._shared = (self._shared[0], times[2])
        return made

    def split(self, sizes: Sequence[int], dim: int) -> tuple[Value, ...]:
        """Cut along an axis."""
        if len(sizes) == 1:
            return (self,)
        axis = dim % len(self.shape)
        names = self.tracer.graph.node(
            "Split", self.name, self.tracer.graph.integers(*sizes), outputs=len(sizes), axis=axis
        )
        return tuple(
            Value(self.tracer, name, (*self.shape[:axis], size, *self.shape[axis + 1 :]), self.dtype)
            for name, size in zip(names, sizes, strict=True)
        )

    def chunk(self, count: int, dim: int) -> tuple[Value, ...]:
        """Cut into equal parts."""
        size = _number(self.shape[dim])
        assert size % count == 0
        return self.split([size // count] * count, dim)

    def __getitem__(self, key: tuple[slice | EllipsisType | None, ...]) -> Value:
        """New axes, x[:, None, None, :], or a range of the last axis, x[..., start:stop]."""
        first, *others = key
        if first is Ellipsis:
            (chosen,) = others
            assert isinstance(chosen, slice) and chosen.step is None, (
                "only a range of the last axis is supported"
            )
            if isinstance(self.shape[-1], str):
                return self._open_axis(chosen)
            return self._last_axis(*chosen.indices(_number(self.shape[-1]))[:2])
        result = self
        for axis, each in enumerate(key):
            assert each is None or each == slice(None), "only new axes are known"
            if each is None:
                result = result.unsqueeze(axis)
        return result

    def _last_axis(self, start: int, stop: int) -> Value:
        ends = (self.tracer.graph.integers(place) for place in (start, stop, -1))
        shape = (*self.shape[:-1], stop - start)
        return self.tracer.emit("Slice", self.name, *ends, shape=shape, dtype=self.dtype)

    def _open_axis(self, chosen: slice) -> Value:
        """All but the first elements of a last axis that is open, or so many of its last."""
        start, size = chosen.start, str(self.shape[-1])
        assert isinstance(start, int) and chosen.stop is None, "only a beginning is supported"
        ends = (self.tracer.graph.integers(place) for place in (start, END, -1))
        kept = -start if start < 0 else _less(size, start)
        return self.tracer.emit("Slice", self.name, *ends, shape=(*self.shape[:-1], kept), dtype=self.dtype)

    def _binary(
        self, op: str, other: Value | Number | torch.nn.Parameter, dtype: torch.dtype | None = None
    ) -> Value:
        if isinstance(other, Value):
            name, shape = other.name, _broadcast(self.shape, other.shape)
        elif isinstance(other, torch.nn.Parameter):
            name = self.tracer.weights.vector(self.tracer.parameters[id(other)])
            shape = _broadcast(self.shape, tuple(other.shape))
        else:
            name, shape = self.tracer.constant(other, self.dtype), self.shape
        return self.tracer.emit(op, self.name, name, shape=shape, dtype=dtype or self.dtype)

    def _reduced(self, op: str, dim: int, keepdim: bool) -> Value:
        assert keepdim, "only with its axis kept"
        shape = list(self.shape)
        shape[dim] = 1
        axes = self.tracer.graph.integers(dim % len(shape))
        return self.tracer.emit(op, self.name, axes, shape=shape, dtype=self.dtype, keepdims=1)

    def _unary(self, op: str) -> Value:
        return self.tracer.emit(op, self.name, shape=self.shape, dtype=self.dtype)


def _less(size: str, by: int) -> Dimension:
    """An open size without some elements: "4 + new" without four is "new"."""
    number, plus, rest = size.partition(" + ")
    if not plus or not number.isdecimal() or int(number) < by:
        return f"{size} - {by}"
    return rest if int(number) == by else f"{int(number) - by} + {rest}"


def _number(size: Dimension) -> int:
    assert isinstance(size, int), f"{size} is open, and a number is needed"
    return size


def _broadcast(first: tuple[Dimension, ...], second: tuple[Dimension, ...]) -> tuple[Dimension, ...]:
    length = max(len(first), len(second))
    pairs = zip((1,) * (length - len(first)) + first, (1,) * (length - len(second)) + second, strict=True)
    return tuple(b if a == 1 else a for a, b in pairs)


def _linear(x: Value, weight: Tensor, bias: Tensor | None = None) -> Value:
    product = x.tracer.weights.linear(x.name, x.tracer.parameters[id(weight)])
    return _with_bias(x, product, weight.shape[0], bias)


def _linears(x: Value, layers: Sequence[Any]) -> list[Value]:
    names = [x.tracer.parameters[id(layer.weight)] for layer in layers]
    products = x.tracer.weights.linears(x.name, names)
    return [
        _with_bias(x, product, layer.weight.shape[0], layer.bias)
        for product, layer in zip(products, layers, strict=True)
    ]


def _with_bias(x: Value, product: str, out: int, bias: Tensor | None) -> Value:
    """The product of x with a weight, as a value [..., out], and its bias added."""
    tracer, shape = x.tracer, (*x.shape[:-1], out)
    if bias is None:
        return Value(tracer, product, shape, x.dtype)
    name = tracer.weights.vector(tracer.parameters[id(bias)])
    return tracer.emit("Add", product, name, shape=shape, dtype=x.dtype)


def _embedding(ids: Value, weight: Tensor, *args: Any, **kwargs: Any) -> Value:
    tracer, shape = ids.tracer, (*ids.shape, weight.shape[1])
    if (name := tracer.parameters.get(id(weight))) is not None:
        return Value(tracer, tracer.weights.embedding(ids.name, name), shape, tracer.dtype)
    return _table(ids, weight)


def _table(ids: Value, table: Tensor) -> Value:
    """Rows of a constant table of rotations; one of two equal halves is stored."""
    tracer, graph = ids.tracer, ids.tracer.graph
    half = half_table(table)
    if half is not None:
        rows = graph.node("Gather", graph.constant(half), ids.name)
        rows = graph.node("Concat", rows, rows, axis=-1)
    else:
        rows = graph.node("Gather", graph.constant(table.float().numpy()), ids.name)
    return Value(tracer, rows, (*ids.shape, table.shape[1]), torch.float32).to(tracer.dtype)


def half_table(table: Tensor, *, interleaved: bool = False) -> NDArray[np.float32] | None:
    """Each angle of a table of rotations once, float32 [positions, width / 2].

    Args:
        table: [positions, width]; it holds each angle twice.
        interleaved: side by side; otherwise in its two halves.

    Returns:
        None when the two differ.
    """
    array = table.float().numpy()
    width = array.shape[1] // 2
    if array.shape[1] % 2:
        return None
    first, second = (array[:, ::2], array[:, 1::2]) if interleaved else (array[:, :width], array[:, width:])
    return first if np.array_equal(first, second) else None


def _attention(queries: Value, keys: Value, values: Value, attn_mask: Value) -> Value:
    """Scaled dot product attention. Query heads that share keys are taken as further queries: nothing is copied."""
    times = 1
    if keys._shared is not None and values._shared is not None:
        (keys, times), (values, _) = keys._shared, values._shared
    tracer, graph = queries.tracer, queries.tracer.graph
    heads, head_dim = _number(queries.shape[1]), _number(queries.shape[3])
    queries = queries * head_dim**-0.5
    mask = attn_mask.name
    new: Dimension = queries.shape[2]
    if times > 1:
        # head h = kv_head * times + j becomes the rows j * new + s of its key/value head
        new = f"{times} * {new}"
        queries = tracer.emit(
            "Reshape", queries.name, graph.integers(0, heads // times, -1, head_dim),
            shape=(queries.shape[0], heads // times, new, head_dim), dtype=queries.dtype,
        )  # fmt: skip
        mask = graph.node("Concat", *[mask] * times, axis=2)
    scores = queries @ keys.transpose(2, 3)
    scores = scores + Value(tracer, mask, (attn_mask.shape[0], 1, new, attn_mask.shape[3]), attn_mask.dtype)
    mixed = scores.softmax(-1) @ values
    shape = (mixed.shape[0], heads, attn_mask.shape[2], head_dim)
    if times == 1:
        return mixed
    return tracer.emit(
        "Reshape", mixed.name, graph.integers(0, heads, -1, head_dim), shape=shape, dtype=mixed.dtype
    )


def _cat(values: Sequence[Value], dim: int) -> Value:
    first, axis = values[0], dim % len(values[0].shape)
    sizes = [value.shape[axis] for value in values]
    if all(isinstance(size, int) for size in sizes):
        size: Dimension = sum(size for size in sizes if isinstance(size, int))
    else:
        size = " + ".join(map(str, sizes))
    shape = (*first.shape[:axis], size, *first.shape[axis + 1 :])
    names = [value.name for value in values]
    return first.tracer.emit("Concat", *names, shape=shape, dtype=first.dtype, axis=axis)


def _convolution(
    x: Value, weight: Tensor, bias: Tensor | None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Value:  # fmt: skip
    """Each channel [batch, channels, columns] with a kernel of its own, without padding."""
    channels, one, width = weight.shape
    plain = (stride, padding, dilation, groups, one) == (1, 0, 1, channels, 1)
    assert plain, "only plain depthwise convolutions are known"
    tracer = x.tracer
    operands = [tracer.weights.kernel(tracer.parameters[id(weight)])]
    if bias is not None:
        operands.append(tracer.weights.vector(tracer.parameters[id(bias)]))
    size = x.shape[2]
    columns = size - width + 1 if isinstance(size, int) else _less(size, width - 1) if width > 1 else size
    return tracer.emit(
        "Conv",
        x.name,
        *operands,
        shape=(*x.shape[:2], columns),
        dtype=x.dtype,
        group=channels,
        kernel_shape=[width],
    )


def _silu(x: Value, inplace: bool = False) -> Value:
    return x * x._unary("Sigmoid")


def _gelu(x: Value, approximate: str = "none") -> Value:
    if approximate == "tanh":
        inner = (x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)
        return x * 0.5 * (inner.tanh() + 1.0)
    return x * 0.5 * ((x * math.sqrt(0.5))._unary("Erf") + 1.0)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    linears: _linears,
    F.linear: _linear,
    F.conv1d: _convolution,
    F.embedding: _embedding,
    F.silu: _silu,
    F.gelu: _gelu,
    F.relu: lambda x, inplace=False: x._unary("Relu"),
    F.softplus: lambda x: x._unary("Softplus"),
    F.scaled_dot_product_attention: _attention,
    torch.cat: _cat,
    torch.rsqrt: lambda x: x._unary("Sqrt")._unary("Reciprocal"),
    torch.sigmoid: lambda x: x._unary("Sigmoid"),
    torch.tanh: Value.tanh,
}
