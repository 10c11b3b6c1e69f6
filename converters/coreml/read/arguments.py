"""Checks of what a caller passes to a function: inputs and states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from converters.coreml.read.precision import Precision
from converters.coreml.read.program import Function, FunctionInput
from edkm_export.array_input import as_tensor
from edkm_export.errors import InputError, PackageError

__all__ = ["check_inputs", "check_states", "make_states"]


def check_inputs(function: Function, given: Mapping[str, Any], precision: Precision) -> dict[str, Tensor]:
    """Check the inputs of a run and bring them to the dtypes of the interpreter.

    Raises:
        InputError: an input is missing, unknown, or of the wrong shape or kind.
    """
    names = ", ".join(function.inputs) or "none"
    unknown = [name for name in given if name not in function.inputs]
    if unknown:
        raise InputError(f"function {function.name} has no input {unknown[0]!r}; its inputs are {names}.")
    missing = [name for name, spec in function.inputs.items() if name not in given and spec.default is None]
    if missing:
        raise InputError(
            f"input {missing[0]!r} of function {function.name} is missing; its inputs are {names}."
        )
    return {
        name: _check_input(spec, given[name] if name in given else _default(spec), precision)
        for name, spec in function.inputs.items()
    }


def _default(spec: FunctionInput) -> Tensor:
    """What an optional input holds when it is left out."""
    assert spec.default is not None
    dtype = torch.float32 if spec.type.dtype.is_float else spec.type.dtype.compute
    return torch.full(spec.default_shape, spec.default).to(dtype)


def _check_input(spec: FunctionInput, value: Any, precision: Precision) -> Tensor:
    value = as_tensor(value, f"input {spec.name!r}")
    shape = tuple(value.shape)
    if not _shape_allowed(spec, shape):
        allowed = (
            f"one of {[list(shape) for shape in spec.enumerated]}" if spec.enumerated else f"{spec.type}"
        )
        if spec.ranges:
            allowed += " with sizes " + ", ".join(
                f"{low}..{'' if high is None else high}" for low, high in spec.ranges
            )
        raise InputError(f"input {spec.name!r} has shape {list(shape)}, expected {allowed}.")
    dtype = spec.type.dtype
    if value.is_floating_point() and not dtype.is_float:
        raise InputError(f"input {spec.name!r} is {value.dtype}, expected {dtype.name}.")
    carrier = precision.carrier(dtype)
    converted = value.detach().to(carrier)
    if not dtype.is_float and dtype.name != "bool" and value.numel():
        low, high = (int(bound) for bound in value.long().aminmax())
        limits = torch.iinfo(dtype.stored)
        if low < limits.min or high > limits.max:
            wrong = low if low < limits.min else high
            raise InputError(f"input {spec.name!r} holds {wrong}, which {dtype.name} cannot.")
    return precision.settle(converted, dtype, rounded=False, owned=False)


def _shape_allowed(spec: FunctionInput, shape: tuple[int, ...]) -> bool:
    declared = spec.type.shape
    if spec.enumerated:
        return shape in spec.enumerated
    if declared is None:
        return True
    if len(shape) != len(declared) or any(
        expected is not None and size != expected for size, expected in zip(shape, declared, strict=True)
    ):
        return False
    if spec.ranges is None or len(spec.ranges) != len(shape):
        return True
    return all(
        low <= size and (high is None or size <= high)
        for size, (low, high) in zip(shape, spec.ranges, strict=True)
    )


def make_states(function: Function, where: str) -> dict[str, Tensor]:
    """States of a fresh conversation: zeros; floating point is held in float32, which loses nothing.

    Raises:
        PackageError: a state has a flexible shape.
    """
    states = {}
    for name, spec in function.states.items():
        shape = spec.type.fixed_shape
        if shape is None:
            raise PackageError(
                f"{where}: function {function.name}: state {name!r} is {spec.type}; its shape must be fixed."
            )
        states[name] = torch.zeros(shape, dtype=Precision.FLOAT32.carrier(spec.type.dtype))
    return states


def check_states(function: Function, given: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Check the states of a run.

    Raises:
        InputError: a state is missing, unknown, or of the wrong shape or dtype.
    """
    states = {} if given is None else given
    if states.keys() != function.states.keys():
        found, expected = (", ".join(sorted(names)) or "none" for names in (states, function.states))
        raise InputError(
            f"function {function.name} has the states {expected}, found {found}; "
            "pass state=package.new_state()."
        )
    for name, spec in function.states.items():
        value, shape = states[name], spec.type.fixed_shape
        carrier = Precision.FLOAT32.carrier(spec.type.dtype)
        if tuple(value.shape) != shape or value.dtype != carrier:
            raise InputError(
                f"state {name!r} is {value.dtype} {list(value.shape)}, expected {carrier} of {spec.type}."
            )
    return states
