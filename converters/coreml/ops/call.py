"""What surrounds an op while it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from converters.coreml.precision import Precision
from converters.coreml.program import Operation
from edkm_export.errors import InputError, PackageError, UnsupportedOpError

__all__ = ["Call", "OutOfRange", "StateCell", "UnsupportedForm", "located"]


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
    """What an op may need to know beyond its arguments.

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


@contextmanager
def located(where: str) -> Iterator[None]:
    """Turn what goes wrong in an op into an error that says where.

    Args:
        where: package, function and op.

    Raises:
        UnsupportedOpError: a form that is not implemented.
        InputError: an index out of range, which stems from the inputs of the run.
        PackageError: anything else that the op could not do.
    """
    try:
        yield
    except UnsupportedForm as error:
        raise UnsupportedOpError(f"{where}: {error}.") from error
    except OutOfRange as error:
        raise InputError(f"{where}: {error}.") from error
    except (PackageError, RuntimeError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise PackageError(f"{where}: {error}") from error
