"""Weights of a file, one tensor at a time, into a transformers model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edkm_export.errors import SourceError
from edkm_export.reference.gguf.gguf_file import GgufFile, StoredTensor
from edkm_export.reference.gguf.tensor_names import InTurn, Place

__all__ = ["fill", "read_parameter", "skeleton", "wrong_shapes"]

_PART = 1 << 22  # values that are decoded at once: 16 MB in float32, and decoding takes several times as much


def skeleton(config: Any, dtype: torch.dtype) -> Any:
    """The model that a configuration describes, with parameters on the meta device."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def wrong_shapes(model: Any, file: GgufFile, places: Mapping[str, Place]) -> dict[str, str]:
    """{tensor that does not fit its parameter: why not}."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wrong = {}
    for name, place in places.items():
        stored = file.tensors.get(name)
        if stored is None:
            continue
        shape = stored.shape
        if place.change == "transposed" and len(shape) == 2:
            shape = shape[::-1]
        elif place.change == "convolution" and len(shape) == 2:
            shape = (shape[0], 1, shape[1])
        if shape != shapes[place.parameter]:
            wrong[name] = (
                f"has the shape {list(stored.shape)}, but {place.parameter} of the model that its metadata describes "
                f"is {list(shapes[place.parameter])}"
            )
    return wrong


def fill(
    model: Any,
    file: GgufFile,
    places: Mapping[str, Place],
    dtype: torch.dtype,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Give every parameter of a skeleton its values, each once.

    Args:
        model: from `skeleton`.
        file: the file, with a tensor for each place that is not optional.
        places: {name of a tensor: its place}.
        dtype: of the parameters.
        advance: called with the number of values of each tensor when it is read.

    Raises:
        SourceError: a value that the dtype cannot hold, or that is no number; a parameter is left without values.
    """
    from accelerate.utils import set_module_tensor_to_device

    parameters = dict(model.named_parameters())
    filled = set()
    for name, place in places.items():
        stored = file.tensors.get(name)
        value = read_parameter(file, name, place, parameters[place.parameter].shape, dtype)
        set_module_tensor_to_device(model, place.parameter, "cpu", value=value, dtype=dtype)
        filled.add(place.parameter)
        if advance is not None and stored is not None:
            advance(stored.numel)
    model.tie_weights()
    left = sorted(name for name, parameter in model.named_parameters() if parameter.is_meta)
    if left:
        raise SourceError(f"{file.path}: no tensor of it belongs to parameter {left[0]}.")


def read_parameter(file: GgufFile, name: str, place: Place, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Values of one parameter.

    Args:
        file: the file.
        name: of the tensor; one that the file does not hold is optional, and zero.
        place: of the tensor.
        shape: of the parameter.
        dtype: of the result.

    Raises:
        SourceError: a value that the dtype cannot hold, or that is no number.
    """
    stored = file.tensors.get(name)
    if stored is None:  # optional in all layers
        return torch.zeros(shape, dtype=dtype)
    return _restored(_read(stored, place, dtype), place)


def _read(stored: StoredTensor, place: Place, dtype: torch.dtype) -> Tensor:
    """The values as they are stored, rows first; [shape]."""
    made = torch.empty(stored.rows, stored.shape[-1], dtype=dtype)
    step = max(1, _PART // stored.shape[-1])
    for first in range(0, stored.rows, step):
        last = min(first + step, stored.rows)
        values = stored.values(first, last)
        if place.change == "minus one":
            values = values - np.float32(1)
        elif place.change == "negative exponential":
            values = _logarithms(values, stored, place)
        _check(values, stored, place, dtype)
        made[first:last] = torch.from_numpy(np.ascontiguousarray(values))
    return made.reshape(stored.shape)


def _logarithms(values: NDArray[np.float32], stored: StoredTensor, place: Place) -> NDArray[np.float32]:
    """Of the negated values."""
    if not (values < 0).all():
        raise SourceError(
            f"{stored.path}: {stored.name} ({place.parameter}): holds a value that is not below zero."
        )
    found: NDArray[np.float32] = np.log(-values)
    return found


def _check(values: NDArray[np.float32], stored: StoredTensor, place: Place, dtype: torch.dtype) -> None:
    largest = np.abs(values).max()  # not a number when any value is none
    if np.isfinite(largest) and largest <= torch.finfo(dtype).max:
        return
    where = f"{stored.path}: {stored.name} ({place.parameter})"
    if not np.isfinite(largest):
        raise SourceError(f"{where}: holds a value that is no finite number.")
    raise SourceError(
        f"{where}: holds {largest:,.0f}, but the largest number of {str(dtype).removeprefix('torch.')} is "
        f"{torch.finfo(dtype).max:,.0f}. Phones compute in float16: scale the model's weights first."
    )


def _restored(value: Tensor, place: Place) -> Tensor:
    """Undo what moved the values."""
    if place.change == "transposed":
        return value.T.contiguous() if value.ndim == 2 else value
    if place.change == "interleaved":
        rows = value.shape[0] // place.heads
        pairs = value.reshape(place.heads, rows // 2, 2, *value.shape[1:])
        return pairs.transpose(1, 2).reshape(value.shape).contiguous()
    if place.in_turn is not None:
        value = _by_keys(value, place.in_turn)
    return value.unsqueeze(1) if place.change == "convolution" else value


def _by_keys(value: Tensor, heads: InTurn) -> Tensor:
    """Heads of values beside those that they share a head of keys with."""
    before, moved = value.tensor_split([heads.first], heads.axis)
    shape, axis = moved.shape, heads.axis
    split = moved.reshape(*shape[:axis], heads.times, heads.keys, heads.size, *shape[axis + 1 :])
    moved = split.transpose(axis, axis + 1).reshape(shape)
    return torch.cat([before, moved], heads.axis).contiguous()
