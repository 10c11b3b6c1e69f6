"""What surrounds an op while it is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from converters.coreml.read.precision import Precision
from converters.coreml.read.program import Operation
from edkm_export.errors import InputError, PackageError, UnsupportedOpError

__all__ = [
    "FAULTS",
    "Call",
    "NestedBlock",
    "OutOfRange",
    "StateCell",
    "TensorList",
    "UnsupportedForm",
    "explained",
    "located",
]

NestedBlock: TypeAlias = Callable[..., tuple[Any, ...]]
"""Runs a nested block on the values that it is given; returns what the block returns."""


class UnsupportedForm(Exception):
    """An op is known, but not in this mode, rank or combination of attributes."""


class OutOfRange(Exception):
    """An index that a run computed lies beyond the axis that it points into."""


@dataclass(eq=False)
class StateCell:
    """A state during a run; `read_state` and `write_state` go through it.

    Attributes:
        name: of the state.
        states: the tensors of all states, as the caller of the run holds them.
    """

    name: str
    states: dict[str, Tensor]

    @property
    def tensor(self) -> Tensor:
        """The tensor of this state."""
        return self.states[self.name]

    @tensor.setter
    def tensor(self, value: Tensor) -> None:
        self.states[self.name] = value


@dataclass(frozen=True)
class TensorList:
    """A list of tensors of one shape, which ops read, and copy to write.

    Attributes:
        elements: None where nothing has been written.
        grows: a write beyond the end makes it longer.
        empty: what an element holds that has not been written.
    """

    elements: tuple[Tensor | None, ...]
    grows: bool
    empty: Tensor

    def read(self, index: int) -> Tensor:
        """The element at `index`.

        Raises:
            OutOfRange: there is none.
        """
        if not 0 <= index < len(self.elements):
            raise OutOfRange(f"index {index} is out of range for a list of {len(self.elements)}")
        element = self.elements[index]
        return self.empty if element is None else element

    def write(self, index: int, value: Tensor) -> TensorList:
        """A copy with another element at `index`.

        Raises:
            OutOfRange: the list is shorter, and cannot grow.
        """
        if index < 0 or (index >= len(self.elements) and not self.grows) or index >= _MAX_LENGTH:
            raise OutOfRange(f"index {index} is out of range for a list of {len(self.elements)}")
        elements = list(self.elements) + [None] * (index + 1 - len(self.elements))
        elements[index] = value
        empty = self.empty if self.empty.shape == value.shape else torch.zeros_like(value)
        return TensorList(tuple(elements), self.grows, empty)


_MAX_LENGTH = 1 << 20  # elements of a list; a program that asks for more is taken for an attack


@dataclass(frozen=True)
class Call:
    """What an op may need beyond its arguments.

    Attributes:
        op: the operation.
        opset: such as `CoreML8`; CoreML5 is iOS 15.
        precision: of the run.
        in_place: the first argument is not used again and may be overwritten.
        blocks: the nested blocks of the op.
        generator: draws random numbers; None for ops that do not.
    """

    op: Operation
    opset: str
    precision: Precision
    in_place: bool = False
    blocks: tuple[NestedBlock, ...] = ()
    generator: torch.Generator | None = None

    @property
    def ios(self) -> int:
        """The iOS version of the opset, 15 for CoreML5; 0 when the name is not of that form."""
        digits = self.opset.removeprefix("CoreML")
        return int(digits) + 10 if digits.isdigit() else 0

    @property
    def carrier(self) -> torch.dtype:
        """The torch dtype that holds the first output."""
        return self.precision.carrier(self.op.outputs[0].type.dtype)


FAULTS = (
    UnsupportedForm,
    OutOfRange,
    PackageError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    MemoryError,
)
"""What the function of an op raises when it cannot compute its result."""


def explained(fault: Exception, where: str) -> PackageError | InputError:
    """The error that says where an op went wrong.

    Args:
        fault: one of `FAULTS`.
        where: package, function and op.

    Returns:
        UnsupportedOpError for a form that is not implemented, InputError for an index out of range, which stems
        from the inputs of the run, PackageError for anything else that the op could not do.
    """
    if isinstance(fault, UnsupportedForm):
        return UnsupportedOpError(f"{where}: {fault}.")
    if isinstance(fault, OutOfRange):
        return InputError(f"{where}: {fault}.")
    return PackageError(f"{where}: {fault}")


@contextmanager
def located(where: str) -> Iterator[None]:
    """Turn what goes wrong in an op into an error that says where.

    Raises:
        UnsupportedOpError, InputError, PackageError: see `explained`.
    """
    try:
        yield
    except FAULTS as fault:
        raise explained(fault, where) from fault
