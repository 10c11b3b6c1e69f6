"""The ML program of a package as small dataclasses, read from the protobuf messages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from converters.coreml.backend import model_message
from converters.coreml.read.block import Block, BlockReader, Operation, Output
from converters.coreml.read.budget import MOST_COMPUTED, Budget
from converters.coreml.read.values import TensorType, read_type
from edkm_export.errors import PackageError
from edkm_export.regular_file import read_regular

__all__ = ["Block", "Function", "FunctionInput", "Operation", "Output", "Program", "read_program"]

_MOST_BYTES = 1 << 31  # protobuf takes no larger message


@dataclass(frozen=True)
class FunctionInput:
    """An input of a function, or a state.

    Attributes:
        name: its name.
        type: element type and shape, None where flexible.
        ranges: (smallest, largest) of each axis when the description gives them; largest None is open.
        enumerated: the only shapes that are allowed, when the description lists them.
        default: value of all its elements when it is left out; None where it is needed.
        default_shape: its shape when it is left out.
    """

    name: str
    type: TensorType
    ranges: tuple[tuple[int, int | None], ...] | None = None
    enumerated: tuple[tuple[int, ...], ...] = ()
    default: float | None = None
    default_shape: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Function:
    """A function of the program.

    Attributes:
        name: its name; "main" in a package with one function.
        opset: opset of the block that runs, such as `CoreML8` for iOS 18.
        inputs: by name, in order.
        outputs: declared types by name, in order.
        states: by name, in order.
        body: what runs.
        images: colour layout of the inputs and outputs that the description says are images, such as `BGR`.
    """

    name: str
    opset: str
    inputs: Mapping[str, FunctionInput]
    outputs: Mapping[str, TensorType]
    states: Mapping[str, FunctionInput]
    body: Block
    images: Mapping[str, str] = field(default_factory=dict)

    @property
    def operations(self) -> tuple[Operation, ...]:
        """In the order in which they run; those of nested blocks are left out."""
        return self.body.operations

    @cached_property
    def all_operations(self) -> tuple[Operation, ...]:
        """Those of nested blocks too, after the operation that holds them."""
        return tuple(self.body.walk())

    def __repr__(self) -> str:
        inputs = ", ".join(f"{name}: {given.type}" for name, given in self.inputs.items())
        outputs = ", ".join(f"{name}: {kind}" for name, kind in self.outputs.items())
        return (
            f"Function({self.name}({inputs}) -> {outputs}; {len(self.operations)} operations, {self.opset})"
        )


@dataclass(frozen=True, eq=False)
class Program:
    """What an .mlmodel holds: functions by name, the default one, and the user-defined metadata."""

    functions: Mapping[str, Function]
    default_function: str
    metadata: Mapping[str, str]


def read_program(path: Path, size_bytes: int) -> Program:
    """Read an .mlmodel that holds an ML program.

    Args:
        path: of the file.
        size_bytes: of its package, which bounds what it may declare.

    Raises:
        PackageError: not such a file, or a malformed one.
        UnsupportedOpError: it uses types that are not tensors.
        BackendMissingError: coremltools is not installed.
    """
    model = model_message()
    from google.protobuf.message import DecodeError

    try:
        model.ParseFromString(read_regular(path, _MOST_BYTES))
    except OSError as error:
        raise PackageError(f"{path}: cannot be read ({error.strerror}).") from error
    except (DecodeError, RecursionError, ValueError) as error:
        raise PackageError(f"{path}: not a Core ML model ({error}); the file is damaged.") from error
    kind = model.WhichOneof("Type")
    if kind != "mlProgram":
        raise PackageError(
            f"{path}: holds {kind or 'no model'}, expected an ML program (.mlpackage of iOS 15 or later)."
        )
    budget = Budget.of(size_bytes)
    described = {function.name: function for function in model.description.functions}
    functions = {
        name: _read_function(path, name, function, described.get(name, model.description), budget)
        for name, function in sorted(model.mlProgram.functions.items())
    }
    default = model.description.defaultFunctionName or "main"
    if default not in functions:
        raise PackageError(
            f"{path}: the default function {default!r} is not among {', '.join(functions) or 'none'}."
        )
    return Program(functions, default, dict(model.description.metadata.userDefined))


def _read_function(path: Path, name: str, message: Any, description: Any, budget: Budget) -> Function:
    if message.opset not in message.block_specializations:
        raise PackageError(f"{path}: function {name}: no block for its opset {message.opset!r}.")
    block = message.block_specializations[message.opset]
    inputs: dict[str, FunctionInput] = {}
    states: dict[str, FunctionInput] = {}
    features = {feature.name: feature for feature in description.input}
    for given in message.inputs:
        owner = f"{path}: function {name}: input {given.name!r}"
        if given.type.WhichOneof("type") == "stateType":
            state = read_type(given.type.stateType.wrappedType, owner)
            states[given.name] = FunctionInput(given.name, state)
        else:
            inputs[given.name] = _read_input(given, features.get(given.name), owner)
            budget.require(inputs[given.name].type, owner)
    budget.require_states([state.type for state in states.values()], f"{path}: function {name}")
    declared = {given: spec.type for given, spec in (inputs | states).items()}
    body = BlockReader(f"{path}: function {name}", declared, budget).read(block)
    outputs = {output: declared[output] for output in body.outputs}
    images = {
        feature.name: feature.type.imageType.ColorSpace.Name(feature.type.imageType.colorSpace)
        for feature in (*description.input, *description.output)
        if feature.type.WhichOneof("Type") == "imageType"
    }
    return Function(name, message.opset, inputs, outputs, states, body, images)


def _read_input(message: Any, feature: Any, owner: str) -> FunctionInput:
    declared = read_type(message.type, owner)
    if feature is None or feature.type.WhichOneof("Type") != "multiArrayType":
        return FunctionInput(message.name, declared)
    array = feature.type.multiArrayType
    flexibility = array.WhichOneof("ShapeFlexibility")
    shapes: tuple[tuple[int, ...], ...] = ()
    ranges: tuple[tuple[int, int | None], ...] | None = None
    if flexibility == "enumeratedShapes":
        shapes = tuple(tuple(shape.shape) for shape in array.enumeratedShapes.shapes)
    if flexibility == "shapeRange":
        ranges = tuple(
            (int(size.lowerBound), int(size.upperBound) if size.upperBound >= 0 else None)
            for size in array.shapeRange.sizeRanges
        )
    default = None
    if feature.type.isOptional:
        given = array.WhichOneof("defaultOptionalValue")
        default = float(getattr(array, given)) if given else 0.0
    shape = declared.fixed_shape if declared.fixed_shape is not None else tuple(array.shape)
    if default is not None and (min(shape, default=0) < 0 or math.prod(shape) > MOST_COMPUTED):
        raise PackageError(f"{owner}: its default has the shape {list(shape)}, which no device can hold.")
    return FunctionInput(message.name, declared, ranges, shapes, default, shape)
