"""The program of an .mlpackage with one function, for editing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edkm_export.checkpoint import Checkpoint

PARAMETERS = "com.github.edkm-export.parameters"


def read(package: Path) -> Any:
    from coremltools.proto import Model_pb2

    (path,) = package.rglob("*.mlmodel")
    message = Model_pb2.Model()
    message.ParseFromString(path.read_bytes())
    return message


def edit(change: Callable[[Program], object]) -> Callable[[Path, Checkpoint], None]:
    """Change the program."""

    def apply(package: Path, _checkpoint: Checkpoint) -> None:
        message = read(package)
        before = message.SerializeToString(deterministic=True)
        change(Program(message))
        after = message.SerializeToString(deterministic=True)
        assert after != before
        (path,) = package.rglob("*.mlmodel")
        path.write_bytes(after)

    return apply


def input_length(message: Any) -> int:
    """Most tokens that a package takes, and so the rows of its RoPE tables."""
    tokens = message.description.input[0].type.multiArrayType
    ranges = tokens.shapeRange.sizeRanges
    return int(ranges[-1].upperBound if ranges else tokens.shape[-1])


class Program:
    """The one function of a package, for editing."""

    def __init__(self, message: Any) -> None:
        self.message = message
        (self.function,) = message.mlProgram.functions.values()
        (self.block,) = self.function.block_specializations.values()
        self.operations = self.block.operations

    def ops(self, kind: str) -> list[Any]:
        return [op for op in self.operations if op.type == kind]

    def maker(self, name: str) -> Any:
        return next(op for op in self.operations if any(output.name == name for output in op.outputs))

    def users(self, name: str) -> list[Any]:
        return [
            op
            for op in self.operations
            if any(one.name == name for given in op.inputs.values() for one in given.arguments)
        ]

    def weight(self, parameter: str) -> str:
        """Name of the value that holds a parameter."""
        names = json.loads(self.message.description.metadata.userDefined[PARAMETERS])
        return next(value for value, name in names.items() if name == parameter)

    def reader(self, parameter: str) -> Any:
        """The op that computes with a parameter."""
        return self.users(self.weight(parameter))[-1]

    def replace(self, old: str, new: str) -> None:
        """Let everything that reads one value read another."""
        for op in self.users(old):
            for given in op.inputs.values():
                for one in given.arguments:
                    if one.name == old:
                        one.name = new

    def constant(self, op: Any, key: str) -> Any:
        """The tensor value of an argument, written at its use or in a const op."""
        (binding,) = op.inputs[key].arguments
        if binding.WhichOneof("binding") == "value":
            return binding.value.immediateValue.tensor
        return self.maker(binding.name).attributes["val"].immediateValue.tensor


def bind(op: Any, key: str, name: str) -> None:
    op.inputs[key].arguments[0].name = name


def bound(op: Any, key: str) -> str:
    return str(op.inputs[key].arguments[0].name)


def swap(op: Any, first: str, second: str) -> None:
    names = bound(op, first), bound(op, second)
    bind(op, first, names[1])
    bind(op, second, names[0])


def swap_bindings(first: Any, second: Any, key: str) -> None:
    names = bound(first, key), bound(second, key)
    bind(first, key, names[1])
    bind(second, key, names[0])


def move(program: Program, place: int, to: int) -> None:
    ordered = list(program.operations)
    ordered.insert(to, ordered.pop(place))
    copies = [type(op).FromString(op.SerializeToString()) for op in ordered]
    del program.operations[:]
    program.operations.extend(copies)


def insert(program: Program, kind: str, name: str, like: Any, place: int, x: str, y: str) -> None:
    """An op on two scalars in front of a place."""
    op = program.operations.add()
    op.CopyFrom(like)
    op.type = kind
    op.outputs[0].name = name
    op.attributes["name"].immediateValue.tensor.strings.values[:] = [name]
    bind(op, "x", x)
    bind(op, "y", y)
    move(program, len(program.operations) - 1, place)


def set_half(tensor: Any, value: float) -> None:
    assert tensor.WhichOneof("value") == "bytes"
    tensor.bytes.values = np.float16(value).tobytes()
