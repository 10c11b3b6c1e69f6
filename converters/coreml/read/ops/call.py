"""What surrounds an op while it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from converters.coreml.read.precision import Precision
from converters.coreml.read.program import Operation
from edkm_export.errors import InputError, PackageError, UnsupportedOpError

__all__ = ["FAULTS", "Call", "OutOfRange", "StateCell", "UnsupportedForm", "explained", "located"]


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
class Call:
    """What an op may need beyond its arguments.

    Attributes:
        op: the operation.
        opset: such as `CoreML8`; CoreML5 is iOS 15.
        precision: of the run.
        in_place: the first argument is not used again and may be overwritten.
    """

    op: Operation
    opset: str
    precision: Precision
    in_place: bool = False

    @property
    def ios(self) -> int:
        """The iOS version of the opset, 15 for CoreML5; 0 when the name is not of that form."""
        digits = self.opset.removeprefix("CoreML")
        return int(digits) + 10 if digits.isdigit() else 0


FAULTS = (
    UnsupportedForm,
    OutOfRange,
    PackageError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
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
