"""Runs one function of a package in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from converters.coreml.read.constants import Constants, ConstantValue
from converters.coreml.read.ops import FAULTS, Call, StateCell, explained
from converters.coreml.read.precision import Precision
from converters.coreml.read.program import Function, Operation
from converters.coreml.read.schedule import schedule
from converters.coreml.read.values import TensorType, Value
from edkm_export.errors import PackageError

__all__ = ["Interpreter", "Observer"]

Observer: TypeAlias = Callable[[Operation, Mapping[str, Tensor]], None]


@dataclass(frozen=True)
class _Constant:
    """A constant binding, which may be a string itself."""

    value: ConstantValue


@dataclass(frozen=True)
class _Bound:
    """An operation at one precision.

    Attributes:
        call: what its op may need beyond its arguments.
        constant: converted arguments that do not change from run to run.
        variable: the other arguments; a binding is the name of a value, or a constant.
    """

    call: Call
    constant: Mapping[str, Any]
    variable: tuple[tuple[str, tuple[str | _Constant, ...]], ...]


class Interpreter:
    """One function, ready to run.

    Args:
        function: the function.
        constants: its constants.
        where: the package, for messages.

    Raises:
        UnsupportedOpError: an op that is not known.
        PackageError: an op uses a value that no operation makes.
    """

    def __init__(self, function: Function, constants: Constants, where: str) -> None:
        self._function = function
        self._constants = constants
        self._where = f"{where}: function {function.name}"
        self._schedule = schedule(function, where)
        self._held: dict[tuple[int, Precision], _Bound] = {}

    @torch.no_grad()
    def run(
        self,
        inputs: Mapping[str, Tensor],
        states: dict[str, Tensor],
        precision: Precision,
        observer: Observer | None = None,
    ) -> dict[str, Tensor]:
        """Run the function.

        Args:
            inputs: checked and converted, see `arguments`.
            states: tensors of the states, changed through write_state.
            precision: of the arithmetic.
            observer: called after each op but const, in order.

        Returns:
            The outputs by name, in memory of their own.

        Raises:
            PackageError: an op could not be computed, or its result does not have the declared type.
            UnsupportedOpError: a form of an op that is not implemented.
            InputError: an index that stems from the inputs is out of range.
        """
        values: dict[str, Tensor | StateCell] = dict(inputs)
        values.update({name: StateCell(name, states) for name in self._function.states})
        if observer is not None:
            self._show_constants(precision, observer)
        for index, scheduled in enumerate(self._schedule):
            made = self._run_one(index, values, precision)
            values.update(made)
            if observer is not None:
                observer(scheduled.operation, made)
            for name in scheduled.frees:
                values.pop(name, None)
        return {name: self._output(name, values, precision) for name in self._function.outputs}

    def _run_one(
        self, index: int, values: Mapping[str, Tensor | StateCell], precision: Precision
    ) -> dict[str, Tensor]:
        scheduled = self._schedule[index]
        operation, definition = scheduled.operation, scheduled.definition
        made: dict[str, Tensor] = {}
        try:
            bound = self._bound(index, precision)
            passed = dict(bound.constant)
            for key, bindings in bound.variable:
                passed[key] = definition.convert(
                    key, [values[one] if isinstance(one, str) else one.value for one in bindings]
                )
            results = definition.compute(bound.call, passed)
            if len(results) != len(operation.outputs):
                raise PackageError(
                    f"{len(operation.outputs)} outputs are declared, the op makes {len(results)}."
                )
            for output, result in zip(operation.outputs, results, strict=True):
                if result.shape != output.type.shape and not _fits(result, output.type):
                    raise PackageError(
                        f"{output.name!r} is declared as {output.type}, the op makes {list(result.shape)}."
                    )
                made[output.name] = precision.settle(
                    result, output.type.dtype, rounded=definition.moves, owned=not definition.moves
                )
        except FAULTS as fault:
            raise explained(fault, f"{self._where}: {operation.label}") from fault
        return made

    def _bound(self, index: int, precision: Precision) -> _Bound:
        """Bind the constant arguments of an operation, once for each precision: a token takes thousands of them."""
        if (index, precision) not in self._held:
            scheduled = self._schedule[index]
            constant: dict[str, Any] = {}
            variable: list[tuple[str, tuple[str | _Constant, ...]]] = []
            for key, bindings in scheduled.operation.arguments.items():
                values = tuple(
                    self._constant(scheduled.operation, binding, precision) for binding in bindings
                )
                if any(isinstance(value, str) for value in values):
                    variable.append((key, values))
                else:
                    held = [value.value for value in values if isinstance(value, _Constant)]
                    constant[key] = scheduled.definition.convert(key, held)
            call = Call(scheduled.operation, self._function.opset, precision, scheduled.in_place)
            self._held[index, precision] = _Bound(call, constant, tuple(variable))
        return self._held[index, precision]

    def _constant(self, operation: Operation, binding: str | Value, precision: Precision) -> str | _Constant:
        """The value of a constant binding; the name of any other."""
        if isinstance(binding, Value):
            return _Constant(self._constants.literal(binding, operation, precision))
        if binding in self._constants:
            return _Constant(self._constants.get(binding, precision))
        return binding

    def _output(self, name: str, values: Mapping[str, Tensor | StateCell], precision: Precision) -> Tensor:
        value = values[name] if name in values else self._constants.get(name, precision)
        if not isinstance(value, Tensor):
            raise PackageError(f"{self._where}: output {name!r} is not a tensor.")
        return value.clone()  # it may be a view of an input, a constant or a state

    def _show_constants(self, precision: Precision, observer: Observer) -> None:
        for name, operation in self._constants.operations.items():
            if operation.type != "const":
                value = self._constants.get(name, precision)
                assert isinstance(value, Tensor)
                observer(operation, {name: value})


def _fits(value: Tensor, declared: TensorType) -> bool:
    if declared.shape is None:
        return True
    return value.dim() == len(declared.shape) and all(
        expected is None or size == expected
        for size, expected in zip(value.shape, declared.shape, strict=True)
    )
