"""A program: its functions with their inputs, outputs and states, and the constants in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.coreai.read.attributes import Attribute, AttributeTable, Contents, Named, TypeIndex
from converters.coreai.read.bytecode import Bytecode, read_bytecode
from converters.coreai.read.element_types import (
    ELEMENT_BITS,
    Described,
    FunctionType,
    Handle,
    TensorType,
    TypeTable,
)
from converters.coreai.read.operations import Block, Operation, read_operations
from edkm_export.errors import PackageError

__all__ = ["Constant", "Function", "Program", "read_program"]

_ASSET, _GRAPH, _CONSTANT = "serialization.asset", "dataflow.graph_v1", "primitive.constant_v1"
_NAME = "aicode.name"
# Places of a graph's properties.
_ARGUMENTS, _TYPE, _PRIVATE, _GRAPH_NAME, _RESULTS = 0, 3, 4, 5, 8

_DTYPES = {
    "float32": "<f4",
    "float16": "<f2",
    "int8": "i1",
    "uint8": "u1",
    "int16": "<i2",
    "int32": "<i4",
    "uint32": "<u4",
    "int64": "<i8",
}


@dataclass(frozen=True)
class Constant:
    """A constant of a function.

    Attributes:
        type: of the tensor, with a fixed shape.
        contents: as they are stored.
    """

    type: TensorType
    contents: Contents

    @property
    def size_bytes(self) -> int:
        """What all elements take."""
        numel = self.type.numel
        assert numel is not None
        return (numel * ELEMENT_BITS[self.type.element] + 7) // 8

    def array(self) -> NDArray[Any]:
        """The elements, of the shape of the type; for elements of whole bytes.

        Raises:
            PackageError: the elements are of another kind.
        """
        if self.type.element not in _DTYPES:
            raise PackageError(f"a constant holds {self.type}, where numbers of whole bytes are expected.")
        values = np.frombuffer(self.contents.raw, _DTYPES[self.type.element])
        shape = [size for size in self.type.shape if size is not None]
        return np.broadcast_to(values[0], shape) if self.contents.splat else values.reshape(shape)

    def packed(self) -> bytes:
        """The elements as one stream of bits, least significant bit first."""
        bits, raw = ELEMENT_BITS[self.type.element], bytes(self.contents.raw)
        if not self.contents.splat:
            return raw
        if bits >= 8:
            return raw * (self.size_bytes // len(raw))
        numel = self.type.numel
        assert numel is not None
        one = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")[:bits]
        return np.packbits(np.tile(one, numel), bitorder="little").tobytes()


class Function:
    """One function.

    Attributes:
        name: of the function.
        inputs, outputs, states: types by name, in order.
        private: it is only called by others.
        body: its operations.
    """

    def __init__(self, program: Program, operation: Operation) -> None:
        self._program = program
        places = program.attributes.properties(operation)
        if len(places) <= _RESULTS or len(operation.regions) != 1 or len(operation.regions[0]) != 1:
            raise PackageError("the program holds a function of an unknown form.")
        name, kind = program.attributes[places[_GRAPH_NAME]], program.attributes[places[_TYPE]]
        if not isinstance(name, str) or not isinstance(kind, TypeIndex):
            raise PackageError("the program holds a function without a name or type.")
        described = program.types[kind.index]
        if not isinstance(described, FunctionType):
            raise PackageError(f"function {name}: its type is no type of functions.")
        self.name, self.body = name, operation.regions[0][0]
        self.private = bool(program.attributes[places[_PRIVATE]])
        self.inputs: dict[str, TensorType] = {}
        self.states: dict[str, TensorType] = {}
        self.outputs: dict[str, TensorType] = {}
        arguments = _names(program.attributes[places[_ARGUMENTS]], len(described.inputs), name)
        if [program.types[index] for index in self.body.arguments] != list(described.inputs):
            raise PackageError(f"function {name}: its body takes other arguments than its type says.")
        for argument, taken in zip(arguments, described.inputs, strict=True):
            self._take(argument, taken)
        results = _names(program.attributes[places[_RESULTS]], len(described.results), name)
        for result, given in zip(results, described.results, strict=True):
            if isinstance(given, TensorType):  # a state gives a token
                self.outputs[result] = given

    def _take(self, argument: str, taken: Described) -> None:
        if argument in self.inputs or argument in self.states:
            raise PackageError(f"function {self.name} has two inputs named {argument!r}.")
        if isinstance(taken, Handle):
            self.states[argument] = taken.inner
        elif isinstance(taken, TensorType):
            self.inputs[argument] = taken
        else:
            raise PackageError(f"function {self.name}: input {argument!r} is neither a tensor nor a state.")

    def op_counts(self) -> dict[str, int]:
        """How often each operation occurs, bodies of composed operations left out; most frequent first."""
        counts = Counter(operation.name for operation in self.body.operations)
        return dict(sorted(counts.items(), key=lambda each: (-each[1], each[0])))

    def operations(self, name: str) -> Iterator[tuple[Block, Operation]]:
        """Operations of a name with the blocks that they are in, composed ones too."""
        for block in self.body.inner():
            for operation in block.operations:
                if operation.name == name:
                    yield block, operation

    def constants(self) -> Iterator[Constant]:
        """All constants, composed operations' too."""
        for _, operation in self.operations(_CONSTANT):
            yield self._program.constant(operation)

    def constant_operand(self, block: Block, operation: Operation, place: int) -> Constant:
        """An operand that must be a constant.

        Raises:
            PackageError: it is none.
        """
        made = self.operand(block, operation, place)
        if made is None or made.name != _CONSTANT:
            found = "an argument" if made is None else made.name
            raise PackageError(
                f"function {self.name}: operand {place} of {operation.name} is made by {found}, expected a constant."
            )
        return self._program.constant(made)

    def operand(self, block: Block, operation: Operation, place: int) -> Operation | None:
        """The operation that makes an operand; None: an argument."""
        if place >= len(operation.operands):
            raise PackageError(f"function {self.name}: {operation.name} has no operand {place}.")
        return block.definitions.get(operation.operands[place])


class Program:
    """A whole program.

    Attributes:
        bytecode: its container.
        functions: by name, private ones too.

    Raises:
        PackageError: it is damaged or not understood; the message names no file.
    """

    def __init__(self, bytecode: Bytecode) -> None:
        self.bytecode = bytecode
        self.types, self.attributes = TypeTable(bytecode), AttributeTable(bytecode)
        self._constants: dict[int, Constant] = {}
        outer = read_operations(bytecode)
        if [operation.name for operation in outer.operations] != [_ASSET]:
            raise PackageError("the program is no Core AI asset.")
        asset = outer.operations[0]
        self.functions: dict[str, Function] = {}
        for region in asset.regions:
            for block in region:
                for operation in block.operations:
                    if operation.name == _GRAPH:
                        self._add(Function(self, operation))

    def _add(self, function: Function) -> None:
        if function.name in self.functions:
            raise PackageError(f"the program has two functions named {function.name!r}.")
        self.functions[function.name] = function

    @property
    def public(self) -> Mapping[str, Function]:
        """The functions that an app calls."""
        return {name: function for name, function in self.functions.items() if not function.private}

    def constant(self, operation: Operation) -> Constant:
        """A constant, whose contents have the size that its type says."""
        key = id(operation)
        if key not in self._constants:
            self._constants[key] = self._read_constant(operation)
        return self._constants[key]

    def _read_constant(self, operation: Operation) -> Constant:
        places = self.attributes.properties(operation)
        if len(operation.types) != 1 or not places:
            raise PackageError("the program holds a constant of an unknown form.")
        kind, contents = self.types.tensor(operation.types[0]), self.attributes[places[0]]
        if not isinstance(contents, Contents):
            raise PackageError(f"a constant of type {kind} has no contents.")
        if kind.numel is None:
            raise PackageError(f"a constant has type {kind}, whose size is not fixed.")
        found = Constant(kind, contents)
        wanted = (ELEMENT_BITS[kind.element] + 7) // 8 if contents.splat else found.size_bytes
        if len(contents.raw) != wanted:
            raise PackageError(f"a constant of type {kind} has {len(contents.raw)} bytes, expected {wanted}.")
        return found


def read_program(data: memoryview) -> Program:
    """Parse a program.

    Raises:
        PackageError: it is damaged or not understood; the message names no file.
    """
    return Program(read_bytecode(data))


def _names(attribute: Attribute, count: int, function: str) -> list[str]:
    """`aicode.name` of each argument or result."""
    if not isinstance(attribute, tuple) or len(attribute) not in (0, count):
        raise PackageError(f"function {function}: its arguments have no names.")
    found = []
    for place in range(count):
        entries = attribute[place] if attribute else ()
        named = entries if isinstance(entries, tuple) else ()
        name = next((each.value for each in named if isinstance(each, Named) and each.name == _NAME), None)
        found.append(name if isinstance(name, str) else f"unnamed_{place}")
    return found
