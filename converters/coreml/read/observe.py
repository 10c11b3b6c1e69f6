"""What happens inside a package: the output of every operation that counts, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from converters.coreml.read.description import Description
from converters.coreml.read.package import Package
from converters.coreml.read.program import Function, Operation
from converters.coreml.read.session import CoreMLSession

__all__ = ["trace_packages"]


def trace_packages(
    packages: Sequence[Package],
    description: Description,
    precision: str,
    tokens: Tensor,
    observe: Callable[[str, Tensor], None],
    cached: int = 0,
) -> None:
    """Run a text in the interpreter and show what each operation makes.

    Args:
        packages: in the order in which they run.
        description: how they are called.
        precision: of the arithmetic.
        tokens: int64 [positions].
        observe: called as `observe(operation, output)`; operations whose result nothing needs are left out.
        cached: so many tokens are fed first and not observed.
    """
    observed = [_Observed(package, observe) for package in packages]
    session = CoreMLSession(observed, description, precision)
    if cached:
        session.feed(tokens[:cached])
    for package in observed:
        package.watching = True
    session.feed(tokens[cached:])


class _Observed:
    """A package that shows what its operations make."""

    def __init__(self, package: Package, observe: Callable[[str, Tensor], None]) -> None:
        self.path: Path = package.path
        self.functions: Mapping[str, Function] = package.functions
        self.default_function: str = package.default_function
        self.new_state = package.new_state
        self.watching = False
        self._package, self._observe = package, observe

    def run(
        self, inputs: Mapping[str, Tensor], *, function: str | None, state: Any, precision: str
    ) -> dict[str, Tensor]:
        if not self.watching:
            return self._package.run(inputs, function=function, state=state, precision=precision)
        used = _used_operations(self.functions[function or self.default_function])

        def show(operation: Operation, made: Mapping[str, Tensor]) -> None:
            if operation in used:
                for value in made.values():
                    self._observe(operation.label, value)

        return self._package.run(inputs, function=function, state=state, precision=precision, observer=show)


def _used_operations(function: Function) -> set[Operation]:
    """Operations but constants whose result goes into an output or a state."""
    needed, used = set(function.outputs), set()
    for operation in reversed(function.operations):
        made = {output.name for output in operation.outputs}
        if not operation.is_constant and (not made or made & needed or operation.type == "write_state"):
            used.add(operation)
            needed.update(operation.uses)
    return used
