"""One row an op: how to build it, and what torch says that it should give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_rng = np.random.default_rng(20261123)


def normal(*shape: int) -> np.ndarray:
    return _rng.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return (_rng.random(shape) * 2 + 0.25).astype(np.float32)


def unit(*shape: int) -> np.ndarray:
    return (_rng.random(shape) * 1.8 - 0.9).astype(np.float32)


def integers(low: int, high: int, *shape: int) -> np.ndarray:
    return _rng.integers(low, high, shape).astype(np.int32)


@dataclass(frozen=True)
class Case:
    """A test of one op.

    Attributes:
        op: its type.
        inputs: arrays fed at run time; floating point is cast to the dtype under test.
        expected: torch reference on tensors of the inputs, called with float32 and int32 tensors.
        params: constant arguments; Python floats are cast to the dtype under test.
        note: tells apart the cases of one op.
        boolean: inputs that the op takes as booleans; they are fed as integers and cast in the program.
        scalars: inputs that the op takes as scalars; they are fed as vectors of one.
        tuple_input: the op takes all inputs as one tuple of this name.
        inferred: coremltools computes this op on constants, so that its result is a second reference.
        target: the opset.
        half_tolerance: relative to the largest result, in native float16.
    """

    op: str
    inputs: dict[str, np.ndarray]
    expected: Callable[..., Any]
    params: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    boolean: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()
    tuple_input: str | None = None
    inferred: bool = True
    target: str = "iOS18"
    half_tolerance: float = 4e-3

    @property
    def name(self) -> str:
        return f"{self.op}_{self.note}" if self.note else self.op
