"""From the bindings of an argument to the Python value that an op function takes."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from converters.coreml.read.ops.call import StateCell, TensorList

__all__ = ["Converter", "converter_for"]

Converter = Callable[[Sequence[Any]], Any]


def converter_for(hint: Any) -> Converter:
    """Find the conversion for the annotation of a parameter.

    It raises TypeError or ValueError for bindings of another kind.
    """
    if isinstance(hint, types.UnionType):
        (hint,) = (part for part in hint.__args__ if part is not type(None))
    return _CONVERTERS[hint]


def _single(bindings: Sequence[Any]) -> Any:
    if len(bindings) != 1:
        raise ValueError(f"{len(bindings)} values, expected one")
    return bindings[0]


def _tensor(bindings: Sequence[Any]) -> Tensor:
    value = _single(bindings)
    if not isinstance(value, Tensor):
        raise TypeError(f"{_kind(value)}, expected a tensor")
    return value


def _tensors(bindings: Sequence[Any]) -> list[Tensor]:
    return [_tensor((binding,)) for binding in bindings]


def _item(bindings: Sequence[Any]) -> int | float | bool:
    value = _tensor(bindings)
    if value.numel() != 1:
        raise ValueError(f"{value.numel()} elements, expected a scalar")
    return value.item()


def _int(bindings: Sequence[Any]) -> int:
    return int(_item(bindings))


def _float(bindings: Sequence[Any]) -> float:
    return float(_item(bindings))


def _bool(bindings: Sequence[Any]) -> bool:
    return bool(_item(bindings))


def _ints(bindings: Sequence[Any]) -> list[int]:
    """One tensor, or a tuple of scalars."""
    values = _tensors(bindings)
    if any(value.dtype.is_floating_point for value in values):
        raise TypeError("floating point, expected integers")
    return [int(item) for value in values for item in value.reshape(-1).tolist()]


def _bools(bindings: Sequence[Any]) -> list[bool]:
    return [bool(item) for value in _tensors(bindings) for item in value.reshape(-1).tolist()]


def _str(bindings: Sequence[Any]) -> str:
    value = _single(bindings)
    if not isinstance(value, str):
        raise TypeError(f"{_kind(value)}, expected a string")
    return value


def _cell(bindings: Sequence[Any]) -> StateCell:
    value = _single(bindings)
    if not isinstance(value, StateCell):
        raise TypeError(f"{_kind(value)}, expected a state")
    return value


def _list(bindings: Sequence[Any]) -> TensorList:
    value = _single(bindings)
    if not isinstance(value, TensorList):
        raise TypeError(f"{_kind(value)}, expected a list")
    return value


def _constants(bindings: Sequence[Any]) -> tuple[Any, ...]:
    value = _single(bindings)
    if not isinstance(value, tuple):
        raise TypeError(f"{_kind(value)}, expected a constant list")
    return value


def _kind(value: Any) -> str:
    names = {StateCell: "a state", str: "a string", Tensor: "a tensor", TensorList: "a list", tuple: "a list"}
    return names.get(type(value), type(value).__name__)


_CONVERTERS: dict[Any, Converter] = {
    Tensor: _tensor,
    list[Tensor]: _tensors,
    int: _int,
    float: _float,
    bool: _bool,
    str: _str,
    list[int]: _ints,
    list[bool]: _bools,
    StateCell: _cell,
    TensorList: _list,
    tuple: _constants,
    list[Any]: list,
}
