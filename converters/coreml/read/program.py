"""The ML program of a package as small dataclasses, read from the protobuf messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.coreml.backend import model_message
from converters.coreml.read.values import TensorType, Value, read_type, read_value
from edkm_export.errors import PackageError

__all__ = ["Function", "FunctionInput", "Operation", "Output", "Program", "read_program"]

# A tensor that a program declares beyond this is taken for an attack: 2**32 float32 values are 16 GiB.
_MAX_NUMEL = 1 << 32


@dataclass(frozen=True)
class Output:
    """A value that an operation makes: its name and its declared type."""

    name: str
    type: TensorType


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation of a block.

    Attributes:
        type: type of the op, such as `linear`.
        name: its `name` attribute.
        line: its index in the block.
        arguments: inputs and attributes by name; each binding is the name of another value, or a constant.
        outputs: what it makes.
        has_blocks: it holds nested blocks (cond, while_loop).
    """

    type: str
    name: str
    line: int
    arguments: Mapping[str, tuple[str | Value, ...]]
    outputs: tuple[Output, ...]
    has_blocks: bool = False

    @property
    def is_constant(self) -> bool:
        """True for const and constexpr ops: they do not depend on the inputs of the function."""
        return self.type == "const" or self.type.startswith("constexpr_")

    @property
    def label(self) -> str:
        """Type, output and line, for messages."""
        name = self.outputs[0].name if self.outputs else self.name
        return f"{self.type} {name!r} (line {self.line})"


@dataclass(frozen=True)
class FunctionInput:
    """An input of a function, or a state.

    Attributes:
        name: its name.
        type: element type and shape, None where flexible.
        ranges: (smallest, largest) of each axis when the description gives them; largest None is open.
        enumerated: the only shapes that are allowed, when the description lists them.
    """

    name: str
    type: TensorType
    ranges: tuple[tuple[int, int | None], ...] | None = None
    enumerated: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class Function:
    """A function of the program.

    Attributes:
        name: its name; "main" in a package with one function.
        opset: opset of the block that runs, such as `CoreML8` for iOS 18.
        inputs: by name, in order.
        outputs: declared types by name, in order.
        states: by name, in order.
        operations: in the order in which they run.
    """

    name: str
    opset: str
    inputs: Mapping[str, FunctionInput]
    outputs: Mapping[str, TensorType]
    states: Mapping[str, FunctionInput]
    operations: tuple[Operation, ...]

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


def read_program(path: Path) -> Program:
    """Read an .mlmodel that holds an ML program.

    Raises:
        PackageError: not such a file, or a malformed one.
        UnsupportedOpError: it uses types that are not tensors.
        BackendMissingError: coremltools is not installed.
    """
    model = model_message()
    from google.protobuf.message import DecodeError

    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise PackageError(f"{path}: not a Core ML model ({error}); the file is damaged.") from error
    kind = model.WhichOneof("Type")
    if kind != "mlProgram":
        raise PackageError(
            f"{path}: holds {kind or 'no model'}, expected an ML program (.mlpackage of iOS 15 or later)."
        )
    described = {function.name: function for function in model.description.functions}
    functions = {
        name: _read_function(path, name, function, described.get(name, model.description))
        for name, function in sorted(model.mlProgram.functions.items())
    }
    default = model.description.defaultFunctionName or "main"
    if default not in functions:
        raise PackageError(
            f"{path}: the default function {default!r} is not among {', '.join(functions) or 'none'}."
        )
    return Program(functions, default, dict(model.description.metadata.userDefined))


def _read_function(path: Path, name: str, message: Any, description: Any) -> Function:
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
            _refuse_absurd(state, owner)
            states[given.name] = FunctionInput(given.name, state)
        else:
            inputs[given.name] = _read_input(given, features.get(given.name), owner)
    operations = tuple(_read_operation(path, name, line, op) for line, op in enumerate(block.operations))
    declared = {given: spec.type for given, spec in (inputs | states).items()}
    for op in operations:
        for made in op.outputs:
            if made.name in declared:
                raise PackageError(
                    f"{path}: function {name}: {op.label} makes {made.name!r}, which is there already."
                )
            declared[made.name] = made.type
    for output in block.outputs:
        if output not in declared:
            raise PackageError(f"{path}: function {name}: no operation makes the output {output!r}.")
    outputs = {output: declared[output] for output in block.outputs}
    return Function(name, message.opset, inputs, outputs, states, operations)


def _read_input(message: Any, feature: Any, owner: str) -> FunctionInput:
    declared = read_type(message.type, owner)
    _refuse_absurd(declared, owner)
    if feature is None or feature.type.WhichOneof("Type") != "multiArrayType":
        return FunctionInput(message.name, declared)
    array = feature.type.multiArrayType
    flexibility = array.WhichOneof("ShapeFlexibility")
    if flexibility == "enumeratedShapes":
        shapes = tuple(tuple(shape.shape) for shape in array.enumeratedShapes.shapes)
        return FunctionInput(message.name, declared, enumerated=shapes)
    if flexibility == "shapeRange":
        ranges = tuple(
            (int(size.lowerBound), int(size.upperBound) if size.upperBound >= 0 else None)
            for size in array.shapeRange.sizeRanges
        )
        return FunctionInput(message.name, declared, ranges=ranges)
    return FunctionInput(message.name, declared)


def _read_operation(path: Path, function: str, line: int, message: Any) -> Operation:
    kind = message.type
    first = message.outputs[0].name if message.outputs else ""
    owner = f"{path}: function {function}: {kind} {first!r} (line {line})"
    name = first
    arguments: dict[str, tuple[str | Value, ...]] = {}
    for key, attribute in message.attributes.items():
        value = read_value(attribute, f"{owner}: {key}")
        if key == "name":
            name = value.inline if isinstance(value.inline, str) else first
        else:
            arguments[key] = (value,)
    for key, argument in message.inputs.items():
        arguments[key] = tuple(_bindings(argument, f"{owner}: {key}"))
    outputs = []
    for output in message.outputs:
        declared = read_type(output.type, owner)
        _refuse_absurd(declared, owner)
        outputs.append(Output(output.name, declared))
    return Operation(kind, name, line, arguments, tuple(outputs), len(message.blocks) > 0)


def _bindings(argument: Any, owner: str) -> Iterator[str | Value]:
    for binding in argument.arguments:
        if binding.WhichOneof("binding") == "value":
            yield read_value(binding.value, owner)
        else:
            yield binding.name


def _refuse_absurd(declared: TensorType, owner: str) -> None:
    numel = declared.numel
    if numel is not None and numel > _MAX_NUMEL:
        raise PackageError(
            f"{owner}: declared as {declared}, which is {numel} elements; no device can hold that."
        )
