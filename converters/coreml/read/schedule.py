"""What can be known before a function runs: which values die where, which state may be updated in place.

`read_state` hands out the tensor of the state itself, not a copy, and `slice_update` writes into it when no
one could tell: a stateful model would otherwise copy its whole cache four times a layer and token. The rule
for a slice_update of a state: its operand is what read_state gave and is not used again, no other value that
may share that memory is used again, and the next op that touches the state writes the result back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from converters.coreml.read.ops import OpDefinition, definition_of, located
from converters.coreml.read.program import Function, Operation
from edkm_export.errors import PackageError

__all__ = ["Scheduled", "schedule"]


@dataclass(frozen=True)
class Scheduled:
    """One operation to run.

    Attributes:
        operation: the operation.
        definition: what computes it.
        frees: values that are not used after it.
        in_place: a slice_update that may overwrite its operand.
    """

    operation: Operation
    definition: OpDefinition
    frees: tuple[str, ...]
    in_place: bool


def schedule(function: Function, where: str) -> tuple[Scheduled, ...]:
    """Order of work for one function; constants are left out.

    Args:
        function: the function.
        where: the package, for messages.

    Raises:
        UnsupportedOpError: an op that the interpreter does not support.
        PackageError: an op uses a value before it is made.
    """
    operations = [op for op in function.operations if not op.is_constant]
    known = {output.name for op in function.operations if op.is_constant for output in op.outputs}
    known |= function.inputs.keys() | function.states.keys()
    definitions = []
    for operation in operations:
        with located(f"{where}: function {function.name}: {operation.label}"):
            definitions.append(definition_of(operation))
            for name in _used(operation):
                if name not in known:
                    raise PackageError(f"uses {name!r}, which no operation before it makes.")
        known |= {output.name for output in operation.outputs}
    lifetimes = _Lifetimes(function, operations, definitions)
    order = []
    for index, (operation, definition) in enumerate(zip(operations, definitions, strict=True)):
        touched = {*_used(operation), *(output.name for output in operation.outputs)}
        frees = tuple(sorted(name for name in touched if lifetimes.last_use[name] == index))
        order.append(Scheduled(operation, definition, frees, lifetimes.may_update(index)))
    return tuple(order)


def _used(operation: Operation) -> list[str]:
    return [name for bindings in operation.arguments.values() for name in bindings if isinstance(name, str)]


class _Lifetimes:
    """Where the values of a function are made, used last, and what memory they may share."""

    def __init__(
        self, function: Function, operations: list[Operation], definitions: list[OpDefinition]
    ) -> None:
        self._function = function
        self._operations = operations
        self._definitions = definitions
        self._made = {output.name: index for index, op in enumerate(operations) for output in op.outputs}

    @cached_property
    def last_use(self) -> dict[str, int]:
        """Index of the op that uses a value last; one beyond the end for the outputs of the function."""
        last = dict(self._made)  # a value that nobody uses dies where it is made
        for index, operation in enumerate(self._operations):
            last.update(dict.fromkeys(_used(operation), index))
        last.update(dict.fromkeys(self._function.outputs, len(self._operations)))
        return last

    @cached_property
    def _states(self) -> dict[str, frozenset[str]]:
        """The states whose memory a value may share."""
        shared = {name: frozenset([name]) for name in self._function.states}
        nothing: frozenset[str] = frozenset()
        for operation, definition in zip(self._operations, self._definitions, strict=True):
            if definition.moves:  # other ops return memory of their own
                union = nothing.union(*(shared.get(name, nothing) for name in _used(operation)))
                shared.update({output.name: union for output in operation.outputs})
        return shared

    def may_update(self, index: int) -> bool:
        """Tell whether an op is a slice_update that may write into the state that it reads."""
        update = self._operations[index]
        operand = update.arguments.get("x", (None,))[0]
        if update.type != "slice_update" or operand not in self._made or self.last_use[operand] != index:
            return False
        maker = self._operations[self._made[operand]]
        if maker.type != "read_state":
            return False
        (state,) = _used(maker)
        result = update.outputs[0].name
        if sum(state in self._states.get(name, ()) for name in _used(update)) != 1:
            return False  # the values to write share memory with the state
        if any(
            state in shared and self._made.get(name, index) < index < self.last_use[name]
            for name, shared in self._states.items()
        ):
            return False  # another value that was read before is used later
        later = next((op for op in self._operations[index + 1 :] if state in _used(op)), None)
        return later is not None and later.type == "write_state" and later.arguments.get("data") == (result,)
