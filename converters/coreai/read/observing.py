"""What happens inside of a function: its operations' values as outputs, and their way to whoever looks at them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from converters.coreai.read.runtime import AppleRuntime

__all__ = ["ObservedRuntime", "observe"]

_FLOATS = ("f16", "f32")
_UNOBSERVED = ("coreai.constant", "coreai.lut_to_dense")
# On the way from a weight to the product that it is for.
_MOVES = ("coreai.cast", "coreai.transpose", "coreai.reshape", "coreai.expand_dims")


def observe(core: Any, function: Any, weights: Sequence[tuple[Any, str]]) -> dict[str, str]:
    """Make the values of a function's operations outputs of it.

    Args:
        core: Apple's package, see `backend.load_authoring`.
        function: its graph.
        weights: decoded weights with the names of their parameters, by which operations are told apart.

    Returns:
        {name of the output: operation, for people}, in the order in which they are computed.
    """
    ir = core.ir
    operations = [each.operation for each in function.regions[0].blocks[0].operations]
    end = operations[-1]
    values: list[Any] = []
    names: dict[str, str] = {}
    for place, operation in enumerate(operations[:-1]):
        if operation.name in _UNOBSERVED:
            continue
        for result in operation.results:
            if isinstance(result.type, ir.RankedTensorType) and str(result.type.element_type) in _FLOATS:
                names[f"value_{len(values)}"] = _words(operation, place, weights)
                values.append(result)
    with ir.InsertionPoint(end):
        ir.Operation.create(end.name, operands=[*end.operands, *values])
    kind = function.attributes["function_type"].value
    results = [*kind.results, *(value.type for value in values)]
    function.attributes["function_type"] = ir.TypeAttr.get(ir.FunctionType.get(kind.inputs, results))
    told = [ir.DictAttr.get({"coreai.name": ir.StringAttr.get(name)}) for name in names]
    function.attributes["res_attrs"] = ir.ArrayAttr.get([*function.attributes["res_attrs"], *told])
    end.erase()
    return names


def _words(operation: Any, place: int, weights: Sequence[tuple[Any, str]]) -> str:
    words = f"{operation.name.rpartition('.')[2]} (operation {place})"
    for operand in operation.operands:
        while (made := operand.owner) is not None and getattr(made, "name", "") in _MOVES:
            operand = made.operands[0]
        name = next((name for value, name in weights if value == operand), "")
        if name:
            return f"{words} with {name}"
    return words


class ObservedRuntime:
    """A runtime whose calls show the values of their operations.

    Args:
        runtime: of an observed twin.
        values: {function: {output: operation}}, as `rewriting.write_twin` gives them.

    Attributes:
        observer: called with each operation and its value, float32; None: nobody looks.
    """

    def __init__(self, runtime: AppleRuntime, values: Mapping[str, Mapping[str, str]]) -> None:
        self._runtime, self._values = runtime, values
        self.observer: Callable[[str, Tensor], None] | None = None

    def set_state(self, name: str, array: NDArray[Any]) -> None:
        """See `AppleRuntime.set_state`."""
        self._runtime.set_state(name, array)

    def state(self, name: str) -> NDArray[Any]:
        """See `AppleRuntime.state`."""
        return self._runtime.state(name)

    def grow_state(self, name: str, axis: int, length: int) -> None:
        """See `AppleRuntime.grow_state`."""
        self._runtime.grow_state(name, axis, length)

    def call(
        self, function: str, inputs: Mapping[str, NDArray[Any]], **names: Mapping[str, str]
    ) -> dict[str, NDArray[Any]]:
        """See `AppleRuntime.call`; the values are shown, and not returned."""
        outputs = self._runtime.call(function, inputs, **names)
        for output, operation in self._values[function].items():
            value = outputs.pop(output)
            if self.observer is not None:
                self.observer(operation, torch.from_numpy(value.astype(np.float32)))
        return outputs
