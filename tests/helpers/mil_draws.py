"""Random cases of single ops: what is fed, and what numpy says that it should give.

The ops run in the interpreter, in a function made here, without coremltools: thousands of cases take seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from converters.coreml.read.arguments import check_inputs
from converters.coreml.read.block import Block
from converters.coreml.read.constants import Constants
from converters.coreml.read.decoded_weights import DecodedWeights
from converters.coreml.read.interpreter import Interpreter
from converters.coreml.read.precision import Precision
from converters.coreml.read.program import Function, FunctionInput, Operation, Output
from converters.coreml.read.values import DTYPES, STRING, TensorType, Value

TYPES = {dtype.name: dtype for dtype in DTYPES.values()}


@dataclass
class Drawn:
    """One case.

    Attributes:
        inputs: values that are fed, by argument name; a list is a tuple of values.
        expected: what numpy gives, one array an output.
        params: constant arguments.
        ios: version of the opset.
        tolerance: relative to the largest expected value.
        blocks: nested blocks.
    """

    inputs: Mapping[str, Any]
    expected: Any
    params: Mapping[str, Any] = field(default_factory=dict)
    ios: int = 18
    tolerance: float = 1e-5
    blocks: tuple[Block, ...] = ()


Rng = np.random.Generator
DRAWS: dict[str, Callable[[Rng, str], Drawn]] = {}


def draws(*names: str) -> Callable[[Callable[[Rng, str], Drawn]], Callable[[Rng, str], Drawn]]:
    """Register a function that draws cases of these ops; it is called with a generator and the op."""

    def register(function: Callable[[Rng, str], Drawn]) -> Callable[[Rng, str], Drawn]:
        for name in names:
            assert name not in DRAWS, name
            DRAWS[name] = function
        return function

    return register


def literal(value: Any) -> Value:
    """A constant of the program."""
    if isinstance(value, str):
        return Value(TensorType(STRING, ()), value)
    if isinstance(value, tuple):
        return Value(TensorType(STRING, None, "list"), value)
    array = np.asarray(value)
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    if array.dtype == np.int64:
        array = array.astype(np.int32)
    dtype = TYPES[array.dtype.name]
    return Value(TensorType(dtype, array.shape), torch.from_numpy(np.array(array)).to(dtype.stored))


def operation(
    kind: str, arguments: Mapping[str, Any], outputs: Sequence[Output], blocks: tuple[Block, ...] = ()
) -> Operation:
    """An operation; strings that start with % are names of values, everything else is a constant."""
    bindings = {
        key: tuple(
            one[1:] if isinstance(one, str) and one.startswith("%") else literal(one)
            for one in (value if isinstance(value, list) else [value])
        )
        for key, value in arguments.items()
    }
    return Operation(kind, outputs[0].name if outputs else kind, 0, bindings, tuple(outputs), blocks)


def any_shape(dtype: str, kind: str = "tensor") -> TensorType:
    """A type whose rank is open."""
    return TensorType(TYPES[dtype], None, kind)


def run(
    operations: Sequence[Operation],
    inputs: Mapping[str, np.ndarray],
    outputs: Sequence[str],
    *,
    ios: int = 18,
    states: Mapping[str, np.ndarray] | None = None,
    precision: str = "float32",
    seed: int = 0,
) -> list[Any]:
    """Run operations on arrays."""
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in inputs.items()}
    held = {name: torch.from_numpy(np.array(array)) for name, array in (states or {}).items()}
    declared = {
        name: FunctionInput(name, any_shape(str(value.dtype).removeprefix("torch.")))
        for name, value in {**tensors, **held}.items()
    }
    body = Block((), tuple(outputs), tuple(operations))
    function = Function(
        "main",
        f"CoreML{ios - 10}",
        {name: declared[name] for name in tensors},
        {name: any_shape("float32") for name in outputs},
        {name: declared[name] for name in held},
        body,
    )
    layout: Any = SimpleNamespace(root=Path("drawn"))
    interpreter = Interpreter(function, Constants(layout, function, DecodedWeights()), "drawn")
    mode = Precision.of(precision)
    found = interpreter.run(check_inputs(function, tensors, mode), held, mode, seed=seed)
    return [found[name] for name in outputs]


def run_drawn(op: str, drawn: Drawn, precision: str = "float32") -> list[Any]:
    """Run one case."""
    arrays: dict[str, np.ndarray] = {}
    arguments: dict[str, Any] = dict(drawn.params)
    for key, value in drawn.inputs.items():
        names = []
        for place, one in enumerate(value if isinstance(value, list) else [value]):
            names.append(f"%{key}_{place}")
            arrays[names[-1][1:]] = np.asarray(one)
        arguments[key] = names
    outputs = [
        Output(
            f"out_{place}",
            any_shape(np.asarray(one).dtype.name.replace("float64", "float32").replace("int64", "int32")),
        )
        for place, one in enumerate(expected_arrays(drawn))
    ]
    made = operation(op, arguments, outputs, drawn.blocks)
    return run([made], arrays, [output.name for output in outputs], ios=drawn.ios, precision=precision)


def in_float16(drawn: Drawn) -> Drawn:
    """The same case as a float16 program."""

    def narrow(value: Any) -> Any:
        if isinstance(value, list):
            return [narrow(one) for one in value]
        array = np.asarray(value)
        return array.astype(np.float16) if array.dtype == np.float32 else value

    expected = [one.astype(np.float16) if one.dtype.kind == "f" else one for one in expected_arrays(drawn)]
    inputs, params = (
        {key: narrow(value) for key, value in part.items()} for part in (drawn.inputs, drawn.params)
    )
    return replace(drawn, inputs=inputs, params=params, expected=expected)


def expected_arrays(drawn: Drawn) -> list[np.ndarray]:
    """The expected outputs."""
    given = drawn.expected if isinstance(drawn.expected, (list, tuple)) else [drawn.expected]
    return [np.asarray(one) for one in given]


def shape(rng: Rng, low: int = 0, high: int = 4, smallest: int = 0, largest: int = 4) -> list[int]:
    """A shape of rank low to high; an axis of length 0 comes up now and then if `smallest` is 0."""
    sizes = rng.integers(max(smallest, 1), largest + 1, rng.integers(low, high + 1)).tolist()
    if smallest == 0 and sizes and rng.random() < 0.12:
        sizes[rng.integers(len(sizes))] = 0
    return [int(size) for size in sizes]


def floats(rng: Rng, sizes: Sequence[int], low: float = -3.0, high: float = 3.0) -> np.ndarray:
    """float32 values between two bounds."""
    return np.asarray(rng.uniform(low, high, sizes), np.float32)


def ints(rng: Rng, sizes: Sequence[int], low: int = -9, high: int = 10) -> np.ndarray:
    """int32 values from low, below high."""
    return np.asarray(rng.integers(low, high, sizes), np.int32)


def numbers(rng: Rng, sizes: Sequence[int]) -> np.ndarray:
    """float32 or int32 values."""
    return floats(rng, sizes) if rng.random() < 0.6 else ints(rng, sizes)


def pick(rng: Rng, *choices: Any) -> Any:
    """One of the choices."""
    return choices[int(rng.integers(len(choices)))]


def axis_of(rng: Rng, rank: int) -> int:
    """An axis, counted from the front or the end."""
    return int(rng.integers(-rank, rank))
