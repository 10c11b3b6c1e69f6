"""Runs one function of a package in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from converters.coreml.constants import Constants
from converters.coreml.ops import Call, StateCell, located
from converters.coreml.plan import Step, plan_steps
from converters.coreml.precision import Precision
from converters.coreml.program import Function, Operation
from converters.coreml.values import TensorType
from edkm_export.errors import PackageError

__all__ = ["Interpreter", "Observer"]

Observer: TypeAlias = Callable[[Operation, Mapping[str, Tensor]], None]


class Interpreter:
    """One function, ready to run.

    Args:
        function: the function.
        constants: its constants.
        where: the package, for messages.

    Raises:
        UnsupportedOpError: an op that is not known.
        PackageError: an op uses a value that nobody makes.
    """

    def __init__(self, function: Function, constants: Constants, where: str) -> None:
        self._function = function
        self._constants = constants
        self._where = f"{where}: function {function.name}"
        self._steps = plan_steps(function, where)

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
        for step in self._steps:
            made = self._run_step(step, values, precision)
            values.update(made)
            if observer is not None:
                observer(step.operation, made)
            for name in step.frees:
                values.pop(name, None)
        return {name: self._output(name, values, precision) for name in self._function.outputs}

    def _run_step(
        self, step: Step, values: Mapping[str, Tensor | StateCell], precision: Precision
    ) -> dict[str, Tensor]:
        operation, definition = step.operation, step.definition
        arguments = {
            key: [self._bound(operation, binding, values, precision) for binding in bindings]
            for key, bindings in operation.arguments.items()
        }
        call = Call(operation, self._function.opset, precision, step.in_place)
        made: dict[str, Tensor] = {}
        with located(f"{self._where}: {operation.label}"):
            results = definition.evaluate(call, arguments)
            if len(results) != len(operation.outputs):
                raise PackageError(
                    f"{len(operation.outputs)} outputs are declared, the op makes {len(results)}."
                )
            for output, result in zip(operation.outputs, results, strict=True):
                if not _fits(result, output.type):
                    raise PackageError(
                        f"{output.name!r} is declared as {output.type}, the op makes {list(result.shape)}."
                    )
                made[output.name] = precision.settle(
                    result, output.type.dtype, rounded=definition.moves, owned=not definition.moves
                )
        return made

    def _bound(
        self,
        operation: Operation,
        binding: object,
        values: Mapping[str, Tensor | StateCell],
        precision: Precision,
    ) -> object:
        if not isinstance(binding, str):
            return self._constants.literal(binding, operation, precision)  # type: ignore[arg-type]
        return values[binding] if binding in values else self._constants.get(binding, precision)

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
