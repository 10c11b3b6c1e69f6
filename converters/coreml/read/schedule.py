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
from converters.coreml.read.program import Block, Function, Operation
from edkm_export.errors import PackageError

__all__ = ["Scheduled", "ScheduledBlock", "schedule"]


@dataclass(frozen=True, eq=False)
class Scheduled:
    """One operation to run.

    Attributes:
        operation: the operation.
        definition: what computes it.
        frees: values that are not used after it.
        in_place: a slice_update that may overwrite its operand.
        blocks: its nested blocks.
    """

    operation: Operation
    definition: OpDefinition
    frees: tuple[str, ...]
    in_place: bool
    blocks: tuple[ScheduledBlock, ...]


@dataclass(frozen=True, eq=False)
class ScheduledBlock:
    """A nested block to run.

    Attributes:
        inputs: names of the values that it is given.
        outputs: names of the values that it returns.
        steps: what runs.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    steps: tuple[Scheduled, ...]


def schedule(function: Function, where: str) -> tuple[Scheduled, ...]:
    """Order of work for one function; constants are left out.

    Args:
        function: the function.
        where: the package, for messages.

    Raises:
        UnsupportedOpError: an op, or a constant, that the interpreter does not support.
        PackageError: an op uses a value before it is made.
    """
    given = {*function.inputs, *function.states}
    return _steps(function.body, given, tuple(function.states), f"{where}: function {function.name}")


def _steps(block: Block, given: set[str], states: tuple[str, ...], where: str) -> tuple[Scheduled, ...]:
    operations = [op for op in block.operations if not op.is_constant]
    known = given | {output.name for op in block.operations if op.is_constant for output in op.outputs}
    definitions, nested = [], []
    for operation in block.operations:
        with located(f"{where}: {operation.label}"):
            if operation.is_constant:
                if operation.type != "const":
                    definition_of(operation)
                continue
            definitions.append(definition_of(operation))
            for name in operation.uses:
                if name not in known:
                    raise PackageError(f"uses {name!r}, which no operation before it makes.")
        nested.append(tuple(_nested(inner, known, where) for inner in operation.blocks))
        known |= {output.name for output in operation.outputs}
    lifetimes = _Lifetimes(states, block.outputs, operations, definitions)
    order = []
    for index, (operation, definition) in enumerate(zip(operations, definitions, strict=True)):
        touched = {*operation.uses, *(output.name for output in operation.outputs)}
        frees = tuple(sorted(name for name in touched if lifetimes.last_use[name] == index))
        order.append(Scheduled(operation, definition, frees, lifetimes.may_update(index), nested[index]))
    return tuple(order)


def _nested(block: Block, known: set[str], where: str) -> ScheduledBlock:
    """A nested block; what it may share with a state is not followed, so that nothing in it is updated in place."""
    inputs = tuple(given.name for given in block.inputs)
    return ScheduledBlock(inputs, block.outputs, _steps(block, {*known, *inputs}, (), where))


class _Lifetimes:
    """Where the values of a block are made, used last, and what memory they may share."""

    def __init__(
        self,
        states: tuple[str, ...],
        outputs: tuple[str, ...],
        operations: list[Operation],
        definitions: list[OpDefinition],
    ) -> None:
        self._held, self._outputs = states, outputs
        self._operations = operations
        self._definitions = definitions
        self._made = {output.name: index for index, op in enumerate(operations) for output in op.outputs}

    @cached_property
    def last_use(self) -> dict[str, int]:
        """Index of the op that uses a value last; one beyond the end for the outputs of the block."""
        last = dict(self._made)  # a value that nobody uses dies where it is made
        for index, operation in enumerate(self._operations):
            last.update(dict.fromkeys(operation.uses, index))
        last.update(dict.fromkeys(self._outputs, len(self._operations)))
        return last

    @cached_property
    def _states(self) -> dict[str, frozenset[str]]:
        """The states whose memory a value may share."""
        shared = {name: frozenset([name]) for name in self._held}
        nothing: frozenset[str] = frozenset()
        for operation, definition in zip(self._operations, self._definitions, strict=True):
            if definition.moves:  # other ops return memory of their own
                union = nothing.union(*(shared.get(name, nothing) for name in operation.uses))
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
        (state,) = maker.uses
        result = update.outputs[0].name
        if sum(state in self._states.get(name, ()) for name in update.uses) != 1:
            return False  # the values to write share memory with the state
        if any(
            state in shared and self._made.get(name, index) < index < self.last_use[name]
            for name, shared in self._states.items()
        ):
            return False  # another value that was read before is used later
        later = next((op for op in self._operations[index + 1 :] if state in op.uses), None)
        return later is not None and later.type == "write_state" and later.arguments.get("data") == (result,)
