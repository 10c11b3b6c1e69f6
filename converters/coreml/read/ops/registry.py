"""How an operation of MIL is tied to the function that computes it.

To add an op, write a function in the file of its family and decorate it:

    @op("softmax")
    def softmax(x: Tensor, axis: int = -1) -> Tensor:
        return torch.softmax(x, axis)

Parameters carry the names and the defaults of MIL's own documentation. Their annotations say what is wanted:
Tensor, int, float, bool, str, list[int], list[bool] or list[Tensor], each with `| None` where MIL leaves it
optional without a default; StateCell for a state, TensorList for a list, tuple for a constant list, list[Any] for a
tuple of anything, and Call for the op itself (opset, declared outputs, nested blocks).
A form that is not implemented raises UnsupportedForm; the interpreter adds the op and its line.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from converters.coreml.read.ops.call import (
    FAULTS,
    Call,
    OutOfRange,
    StateCell,
    TensorList,
    UnsupportedForm,
    explained,
    located,
)
from converters.coreml.read.ops.coercion import Converter, converter_for
from converters.coreml.read.program import Operation
from edkm_export.errors import PackageError

__all__ = [
    "FAULTS",
    "Call",
    "OpDefinition",
    "OutOfRange",
    "StateCell",
    "TensorList",
    "UnsupportedForm",
    "definition_of",
    "explained",
    "known_ops",
    "located",
    "op",
]


@dataclass(frozen=True)
class OpDefinition:
    """An op type, the function that computes it, and how to pass the arguments.

    Attributes:
        type: as in MIL.
        function: computes the op.
        moves: it only moves values: its result needs no rounding and may share memory with an argument.
        draws: it draws random numbers.
        blocks: how many nested blocks it holds.
        converters: by parameter name.
        required: parameters without a default.
        call_parameter: the parameter that takes the Call, if any.
    """

    type: str
    function: Callable[..., Any]
    moves: bool
    draws: bool
    blocks: int
    converters: Mapping[str, Converter]
    required: frozenset[str]
    call_parameter: str | None

    def evaluate(self, call: Call, arguments: Mapping[str, Sequence[Any]]) -> tuple[Any, ...]:
        """Compute the op.

        Args:
            call: the op and its surroundings.
            arguments: bindings of each argument: tensors, strings or state cells.

        Returns:
            One value an output, a tensor unless a list or a label is declared; none for an op without outputs.

        Raises:
            UnsupportedForm: an argument, or a value of one, that is not implemented.
            PackageError: an argument is missing or of the wrong kind.
        """
        return self.compute(call, {name: self.convert(name, given) for name, given in arguments.items()})

    def convert(self, name: str, bindings: Sequence[Any]) -> Any:
        """Bring the bindings of an argument to the Python value that the function takes.

        Raises:
            UnsupportedForm, PackageError: see `evaluate`.
        """
        converter = self.converters.get(name)
        if converter is None:
            raise UnsupportedForm(f"argument {name!r} is not implemented")
        try:
            return converter(bindings)
        except (TypeError, ValueError) as error:
            raise PackageError(f"argument {name!r}: {error}") from error

    def compute(self, call: Call, passed: dict[str, Any]) -> tuple[Any, ...]:
        """Call the function; `passed` holds converted arguments, and may be changed.

        Raises:
            PackageError: an argument is missing.
        """
        if not self.required <= passed.keys():
            raise PackageError(f"argument {min(self.required - passed.keys())!r} is missing")
        if self.call_parameter is not None:
            passed[self.call_parameter] = call
        result = self.function(**passed)
        if result is None:
            return ()
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)


_Function = TypeVar("_Function", bound=Callable[..., Any])
_OPS: dict[str, OpDefinition] = {}


def op(
    *names: str, moves: bool = False, draws: bool = False, blocks: int = 0
) -> Callable[[_Function], _Function]:
    """Register the function that computes the ops of these types.

    Args:
        names: op types of MIL.
        moves: see `OpDefinition`.
        draws: see `OpDefinition`.
        blocks: see `OpDefinition`.
    """

    def register(function: _Function) -> _Function:
        hints = typing.get_type_hints(function)
        converters = {}
        required = set()
        call_parameter = None
        for name, parameter in inspect.signature(function).parameters.items():
            if hints[name] is Call:
                call_parameter = name
                continue
            converters[name] = converter_for(hints[name])
            if parameter.default is inspect.Parameter.empty:
                required.add(name)
        for name in names:
            assert name not in _OPS, f"{name} is registered twice"
            _OPS[name] = OpDefinition(
                name, function, moves, draws, blocks, converters, frozenset(required), call_parameter
            )
        return function

    return register


def definition_of(operation: Operation) -> OpDefinition:
    """Look up the definition of an op.

    Raises:
        UnsupportedForm: the type is not known.
        PackageError: it does not hold the nested blocks that its type has.
    """
    definition = _OPS.get(operation.type)
    if definition is None:
        raise UnsupportedForm("the interpreter does not support this type of op")
    if len(operation.blocks) != definition.blocks:
        raise PackageError(f"holds {len(operation.blocks)} nested blocks, expected {definition.blocks}.")
    return definition


def known_ops() -> tuple[str, ...]:
    """Types of all registered ops, sorted."""
    return tuple(sorted(_OPS))
