"""Operations and the blocks that hold them, read from the protobuf messages.

A nested block (of cond or while_loop) sees the values around it. Names are unique in what is read here: where two
blocks use a name for different values, the later ones are renamed.
"""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from converters.coreml.read.budget import Budget
from converters.coreml.read.values import TensorType, Value, read_type, read_value
from edkm_export.errors import PackageError

__all__ = ["Block", "BlockReader", "Operation", "Output"]

_MOST_OPERATIONS = 300_000  # each takes a kilobyte; a model of 7 billion weights has ten thousand


@dataclass(frozen=True)
class Output:
    """A value that an operation makes, or that a nested block is given: its name and its declared type."""

    name: str
    type: TensorType


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation of a block.

    Attributes:
        type: type of the op, such as `linear`.
        name: its `name` attribute.
        line: its place in the function, operations of nested blocks counted where they stand.
        arguments: inputs and attributes by name; each binding is the name of another value, or a constant.
        outputs: what it makes.
        blocks: nested blocks: of cond (true, false), of while_loop (condition, body).
    """

    type: str
    name: str
    line: int
    arguments: Mapping[str, tuple[str | Value, ...]]
    outputs: tuple[Output, ...]
    blocks: tuple[Block, ...] = ()

    @property
    def is_constant(self) -> bool:
        """True for const and constexpr ops: they do not depend on the inputs of the function."""
        return self.type == "const" or self.type.startswith("constexpr_")

    @property
    def label(self) -> str:
        """Type, output and line, for messages."""
        name = self.outputs[0].name if self.outputs else self.name
        return f"{self.type} {name!r} (line {self.line})"

    @cached_property
    def uses(self) -> tuple[str, ...]:
        """Names of the values that it uses, those that its blocks take from around them included."""
        direct = [name for bindings in self.arguments.values() for name in bindings if isinstance(name, str)]
        return (*direct, *(name for block in self.blocks for name in block.takes))


@dataclass(frozen=True, eq=False)
class Block:
    """Operations in the order in which they run.

    Attributes:
        inputs: what a nested block is given.
        outputs: names of the values that it returns.
        operations: of the block.
    """

    inputs: tuple[Output, ...]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]

    @cached_property
    def takes(self) -> tuple[str, ...]:
        """Names of the values that it takes from around it, constants of its own left out."""
        own = {given.name for given in self.inputs}
        own |= {made.name for operation in self.operations for made in operation.outputs}
        used = [name for operation in self.operations for name in operation.uses] + list(self.outputs)
        return tuple(dict.fromkeys(name for name in used if name not in own))

    def walk(self) -> Iterator[Operation]:
        """All operations, those of nested blocks after the one that holds them."""
        for operation in self.operations:
            yield operation
            for block in operation.blocks:
                yield from block.walk()


@dataclass
class BlockReader:
    """Reads the blocks of one function.

    Attributes:
        where: package and function, for messages.
        declared: types of all values read so far, by name.
        budget: that the package bears out.
    """

    where: str
    declared: dict[str, TensorType]
    budget: Budget
    _lines: int = field(default=0, init=False)
    _copies: Counter[str] = field(default_factory=Counter, init=False)

    def read(self, message: Any, scope: MutableMapping[str, str] | None = None) -> Block:
        """Read a block.

        Args:
            message: the MIL `Block`.
            scope: of a nested block: the names of the program that it sees, and what they are called here.

        Raises:
            PackageError: a value is made twice or never, or declared absurdly large.
            UnsupportedOpError: a type that is not known.
        """
        nested = scope is not None
        # not copied for each of a thousand blocks; what a block adds is its own
        names: MutableMapping[str, str] = (
            ChainMap({}, scope) if scope is not None else {name: name for name in self.declared}
        )
        inputs = []
        if nested:
            for given in message.inputs:
                declared = read_type(given.type, f"{self.where}: block input {given.name!r}")
                inputs.append(
                    Output(self._declare(given.name, declared, names, self.where, nested), declared)
                )
        operations = tuple(self._operation(op, names, nested) for op in message.operations)
        for output in message.outputs:
            if output not in names:
                raise PackageError(f"{self.where}: no operation makes the output {output!r}.")
        return Block(tuple(inputs), tuple(names[output] for output in message.outputs), operations)

    def _operation(self, message: Any, names: MutableMapping[str, str], nested: bool) -> Operation:
        kind, line = message.type, self._lines
        self._lines += 1
        if line >= _MOST_OPERATIONS:
            raise PackageError(f"{self.where}: has more than {_MOST_OPERATIONS:,} operations; no model has.")
        first = message.outputs[0].name if message.outputs else ""
        owner = f"{self.where}: {kind} {first!r} (line {line})"
        name = first
        arguments: dict[str, tuple[str | Value, ...]] = {}
        for key, attribute in message.attributes.items():
            value = read_value(attribute, f"{owner}: {key}")
            if key == "name":
                name = value.inline if isinstance(value.inline, str) else first
            else:
                arguments[key] = (value,)
        for key, argument in message.inputs.items():
            arguments[key] = tuple(_bindings(argument, names, f"{owner}: {key}"))
        blocks = tuple(self.read(block, names) for block in message.blocks)
        outputs = []
        for output in message.outputs:
            declared = read_type(output.type, owner)
            self.budget.require(declared, owner)
            outputs.append(Output(self._declare(output.name, declared, names, owner, nested), declared))
        return Operation(kind, name, line, arguments, tuple(outputs), blocks)

    def _declare(
        self, name: str, declared: TensorType, names: MutableMapping[str, str], owner: str, nested: bool
    ) -> str:
        if name in names and not nested:
            raise PackageError(f"{owner} makes {name!r}, which is there already.")
        unique = name
        while unique in self.declared:
            self._copies[name] += 1
            unique = f"{name}'{self._copies[name]}"
        names[name] = unique
        self.declared[unique] = declared
        return unique


def _bindings(argument: Any, names: Mapping[str, str], owner: str) -> Iterator[str | Value]:
    for binding in argument.arguments:
        if binding.WhichOneof("binding") == "value":
            yield read_value(binding.value, owner)
        else:
            yield names.get(binding.name, binding.name)
