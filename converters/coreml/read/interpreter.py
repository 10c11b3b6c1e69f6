"""Runs one function of a package in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from converters.coreml.read.constants import Constants
from converters.coreml.read.ops import FAULTS, Call, StateCell, TensorList, explained, located
from converters.coreml.read.precision import Precision
from converters.coreml.read.program import Function, Operation
from converters.coreml.read.schedule import Scheduled, ScheduledBlock, schedule
from converters.coreml.read.values import Inline, TensorType, Value
from edkm_export.errors import EdkmExportError, PackageError

__all__ = ["Interpreter", "Observer"]

Observer: TypeAlias = Callable[[Operation, Mapping[str, Tensor]], None]


@dataclass(frozen=True)
class _Constant:
    """A constant binding, which may be a string itself."""

    value: Inline


@dataclass(frozen=True)
class _Transient:
    """A constant that is looked up at each use: there may be no room for it between two of them."""

    name: str


_Binding: TypeAlias = str | _Constant | _Transient


@dataclass(frozen=True)
class _Bound:
    """An operation at one precision.

    Attributes:
        call: what its op may need beyond its arguments.
        constant: converted arguments that do not change from run to run.
        variable: the other arguments; a binding is the name of a value, or a constant, which may be transient.
    """

    call: Call
    constant: Mapping[str, Any]
    variable: tuple[tuple[str, tuple[_Binding, ...]], ...]


@dataclass(frozen=True)
class _Run:
    """What stays the same during one run."""

    precision: Precision
    bound: dict[Operation, _Bound]
    generator: torch.Generator
    observer: Observer | None


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
        self._held: dict[Precision, dict[Operation, _Bound]] = {precision: {} for precision in Precision}

    @torch.no_grad()
    def run(
        self,
        inputs: Mapping[str, Tensor],
        states: dict[str, Tensor],
        precision: Precision,
        observer: Observer | None = None,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Run the function.

        Args:
            inputs: checked and converted, see `arguments`.
            states: tensors of the states, changed through write_state.
            precision: of the arithmetic.
            observer: called after each op but const, in order.
            seed: of the ops that draw random numbers and have no seed of their own.

        Returns:
            The outputs by name, in memory of their own: tensors, and of a classifier a label and a dictionary.

        Raises:
            PackageError: an op could not be computed, or its result does not have the declared type.
            UnsupportedOpError: a form of an op that is not implemented.
            InputError: an index that stems from the inputs is out of range.
        """
        values: dict[str, Any] = dict(inputs)
        values.update({name: StateCell(name, states) for name in self._function.states})
        if observer is not None:
            self._show_constants(precision, observer)
        generator = torch.Generator().manual_seed(seed)
        self._run_steps(self._schedule, values, _Run(precision, self._held[precision], generator, observer))
        return {name: self._output(name, values, precision) for name in self._function.outputs}

    def _run_steps(self, steps: Sequence[Scheduled], values: dict[str, Any], run: _Run) -> None:
        for scheduled in steps:
            made = self._run_one(scheduled, values, run)
            values.update(made)
            if run.observer is not None:
                tensors = {name: value for name, value in made.items() if isinstance(value, Tensor)}
                run.observer(scheduled.operation, tensors)
            for name in scheduled.frees:
                values.pop(name, None)

    def _run_one(self, scheduled: Scheduled, values: Mapping[str, Any], run: _Run) -> dict[str, Any]:
        operation, definition, precision = scheduled.operation, scheduled.definition, run.precision
        made: dict[str, Any] = {}
        bound = run.bound.get(operation) or self._bound(scheduled, run)
        call = bound.call
        if scheduled.blocks or definition.draws:
            blocks = tuple(_Nested(self, block, values, run) for block in scheduled.blocks)
            call = replace(call, blocks=blocks, generator=run.generator)
        try:
            passed = dict(bound.constant)
            for key, bindings in bound.variable:
                passed[key] = definition.convert(key, [self._given(one, values, run) for one in bindings])
            results = definition.compute(call, passed)
            if len(results) != len(operation.outputs):
                raise PackageError(
                    f"{len(operation.outputs)} outputs are declared, the op makes {len(results)}."
                )
            for output, result in zip(operation.outputs, results, strict=True):
                if not isinstance(result, Tensor):
                    made[output.name] = result
                    continue
                if result.shape != output.type.shape and not _fits(result, output.type):
                    raise PackageError(
                        f"{output.name!r} is declared as {output.type}, the op makes {list(result.shape)}."
                    )
                made[output.name] = precision.settle(
                    result, output.type.dtype, rounded=definition.moves, owned=not definition.moves
                )
        except _InBlock as fault:
            raise fault.error from fault
        except FAULTS as fault:
            raise explained(fault, f"{self._where}: {operation.label}") from fault
        return made

    def run_block(
        self, block: ScheduledBlock, around: Mapping[str, Any], given: Sequence[Any], run: _Run
    ) -> tuple[Any, ...]:
        """Run a nested block.

        Args:
            block: the block.
            around: the values that it sees.
            given: its inputs.
            run: of which it is a part.

        Raises:
            PackageError, UnsupportedOpError, InputError: see `run`.
            ValueError: it takes another number of values.
        """
        if len(given) != len(block.inputs):
            raise ValueError(f"{len(given)} values for a nested block that takes {len(block.inputs)}")
        values = {**around, **dict(zip(block.inputs, given, strict=True))}
        self._run_steps(block.steps, values, run)
        return tuple(
            values[name] if name in values else self._constants.get(name, run.precision)
            for name in block.outputs
        )

    def _bound(self, scheduled: Scheduled, run: _Run) -> _Bound:
        """Bind the constant arguments of an operation, once for each precision: a token takes thousands of them."""
        operation, precision = scheduled.operation, run.precision
        constant: dict[str, Any] = {}
        variable: list[tuple[str, tuple[_Binding, ...]]] = []
        for key, bindings in operation.arguments.items():
            values = tuple(self._constant(operation, binding, precision) for binding in bindings)
            if any(not isinstance(value, _Constant) for value in values):
                variable.append((key, values))
            else:
                held = [value.value for value in values if isinstance(value, _Constant)]
                with located(f"{self._where}: {operation.label}"):
                    constant[key] = scheduled.definition.convert(key, held)
        call = Call(operation, self._function.opset, precision, scheduled.in_place)
        run.bound[operation] = _Bound(call, constant, tuple(variable))
        return run.bound[operation]

    def _given(self, binding: _Binding, values: Mapping[str, Any], run: _Run) -> Any:
        """What an argument is bound to in this run."""
        if isinstance(binding, str):
            return values[binding]
        if isinstance(binding, _Transient):
            return self._constants.get(binding.name, run.precision)
        return binding.value

    def _constant(self, operation: Operation, binding: str | Value, precision: Precision) -> _Binding:
        """The value of a constant binding, or the name of one that nobody may hold; the name of any other."""
        if isinstance(binding, Value):
            return _Constant(self._constants.literal(binding, operation, precision))
        if binding in self._constants and self._constants.is_transient(binding):
            return _Transient(binding)
        if binding in self._constants:
            return _Constant(self._constants.get(binding, precision))
        return binding

    def _output(self, name: str, values: Mapping[str, Any], precision: Precision) -> Any:
        value = values[name] if name in values else self._constants.get(name, precision)
        if isinstance(value, (StateCell, TensorList)):
            raise PackageError(f"{self._where}: output {name!r} is not a tensor.")
        return (
            value.clone() if isinstance(value, Tensor) else value
        )  # it may be a view of an input or a state

    def _show_constants(self, precision: Precision, observer: Observer) -> None:
        for name, operation in self._constants.operations.items():
            if operation.type != "const":
                value = self._constants.get(name, precision)
                assert isinstance(value, Tensor)
                observer(operation, {name: value})


class _InBlock(Exception):
    """An error of an operation in a nested block, which says itself where it is."""

    def __init__(self, error: EdkmExportError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class _Nested:
    """A nested block amid the values that it sees."""

    interpreter: Interpreter
    block: ScheduledBlock
    around: Mapping[str, Any]
    run: _Run

    def __call__(self, *given: Any) -> tuple[Any, ...]:
        try:
            return self.interpreter.run_block(self.block, self.around, given, self.run)
        except EdkmExportError as error:
            raise _InBlock(error) from error


def _fits(value: Tensor, declared: TensorType) -> bool:
    if declared.kind != "tensor":
        return False
    if declared.shape is None:
        return True
    return value.dim() == len(declared.shape) and all(
        expected is None or size == expected
        for size, expected in zip(value.shape, declared.shape, strict=True)
    )
