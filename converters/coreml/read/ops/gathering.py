"""Gather and scatter.

Negative indices count from the end up to iOS 16; from iOS 17 on they are out of range. What a device does
with an index out of range is not defined, so that it is an error here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from converters.coreml.read.ops.registry import Call, OutOfRange, UnsupportedForm, op


def _positions(indices: Tensor, size: int, call: Call) -> Tensor:
    """Check indices into an axis of `size`; int64, not negative."""
    positions = indices.long()
    if positions.numel() == 0:
        return positions
    lowest, highest = (int(bound) for bound in positions.aminmax())
    smallest = -size if call.ios < 17 else 0
    if lowest < smallest or highest >= size:
        wrong = lowest if lowest < smallest else highest
        raise OutOfRange(f"index {wrong} is out of range for an axis of size {size}")
    return torch.where(positions < 0, positions + size, positions) if lowest < 0 else positions


@op("gather", moves=True)
def gather(
    x: Tensor,
    indices: Tensor,
    call: Call,
    axis: int = 0,
    batch_dims: int = 0,
    validate_indices: bool = False,
) -> Tensor:
    """Slices of x along `axis`; the shape is x[:axis] + indices[batch_dims:] + x[axis + 1:]."""
    del validate_indices  # always validated
    axis = _axis(axis, x)
    positions = _positions(indices, x.shape[axis], call)
    shape = x.shape[:axis] + indices.shape[batch_dims:] + x.shape[axis + 1 :]
    if batch_dims == 0:
        return x.index_select(axis, positions.reshape(-1)).reshape(shape)
    if not 0 < batch_dims <= axis or x.shape[:batch_dims] != indices.shape[:batch_dims]:
        raise ValueError(f"batch_dims {batch_dims} for shapes {list(x.shape)} and {list(indices.shape)}")
    batch = math.prod(x.shape[:batch_dims])
    before, after = math.prod(x.shape[batch_dims:axis]), math.prod(x.shape[axis + 1 :])
    source = x.reshape(batch, before, x.shape[axis], after)
    each = math.prod(indices.shape[batch_dims:])
    chosen = positions.reshape(batch, 1, each, 1).expand(-1, before, -1, after)
    return source.gather(2, chosen).reshape(shape)


@op("gather_along_axis", moves=True)
def gather_along_axis(
    x: Tensor, indices: Tensor, call: Call, axis: int = 0, validate_indices: bool = False
) -> Tensor:
    """One value of x along `axis` for each index."""
    del validate_indices  # always validated
    axis = _axis(axis, x)
    return x.gather(axis, _positions(indices, x.shape[axis], call))


@op("gather_nd", moves=True)
def gather_nd(
    x: Tensor, indices: Tensor, call: Call, batch_dims: int = 0, validate_indices: bool = False
) -> Tensor:
    """Slices of x at coordinates; the last axis of `indices` holds a coordinate."""
    del validate_indices  # always validated
    depth = indices.shape[-1]
    if batch_dims + depth > x.dim() or x.shape[:batch_dims] != indices.shape[:batch_dims]:
        raise ValueError(f"batch_dims {batch_dims} for shapes {list(x.shape)} and {list(indices.shape)}")
    batch = math.prod(x.shape[:batch_dims])
    rest = x.shape[batch_dims + depth :]
    source = x.reshape(batch, math.prod(x.shape[batch_dims : batch_dims + depth]), math.prod(rest))
    each = math.prod(indices.shape[batch_dims:-1])
    flat = _flat_positions(indices, x.shape[batch_dims : batch_dims + depth], call).reshape(batch, each)
    chosen = flat[:, :, None].expand(-1, -1, source.shape[2])
    return source.gather(1, chosen).reshape(indices.shape[:-1] + rest)


def _flat_positions(indices: Tensor, sizes: torch.Size, call: Call) -> Tensor:
    """Coordinates [..., depth] as positions in the flattened axes."""
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for axis, size in enumerate(sizes):
        flat = flat * size + _positions(indices[..., axis], size, call)
    return flat


def _update(rows: Tensor, at: Tensor, new: Tensor) -> Tensor:
    """Of several updates of a row the last one counts."""
    last = torch.full((len(rows),), -1).scatter_reduce_(0, at, torch.arange(len(at)), "amax")
    changed = last >= 0
    rows[changed] = new[last[changed]]
    return rows


def _reduce(kind: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda rows, at, new: rows.scatter_reduce_(0, at[:, None].expand_as(new), new, kind)


def _divide(rows: Tensor, at: Tensor, new: Tensor) -> Tensor:
    divisors = _reduce("prod")(torch.ones_like(rows), at, new)
    return rows / divisors if rows.is_floating_point() else torch.div(rows, divisors, rounding_mode="trunc")


_MODES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "update": _update,
    "add": _reduce("sum"),
    "sub": lambda rows, at, new: _reduce("sum")(rows, at, -new),
    "mul": _reduce("prod"),
    "div": _divide,
    "max": _reduce("amax"),
    "min": _reduce("amin"),
}


def _scatter(rows: Tensor, at: Tensor, updates: Tensor, mode: str) -> Tensor:
    """Combine updates [n, width] into a copy of rows [m, width] at the rows `at` [n]."""
    if mode not in _MODES:
        raise UnsupportedForm(f"mode {mode!r}")
    if updates.numel() == 0:
        return rows.clone()
    return _MODES[mode](rows.clone(), at, updates.to(rows.dtype))


@op("scatter")
def scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    call: Call,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    """Combine `updates` with slices of data along `axis`.

    The shape of `updates` is data.shape[:axis] + indices.shape + data.shape[axis + 1:].
    """
    del validate_indices  # always validated
    axis = _axis(axis, data)
    _expect(updates, [*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]])
    at = _positions(indices, data.shape[axis], call).reshape(-1)
    first = data.movedim(axis, 0)
    width = math.prod(first.shape[1:])
    new = updates.flatten(axis, axis + indices.dim() - 1) if indices.dim() else updates.unsqueeze(axis)
    rows = _scatter(
        first.reshape(first.shape[0], width), at, new.movedim(axis, 0).reshape(len(at), width), mode
    )
    return rows.reshape(first.shape).movedim(0, axis)


def _axis(axis: int, x: Tensor) -> int:
    """An axis counted from the front."""
    if not -x.dim() <= axis < x.dim():
        raise ValueError(f"axis {axis} of {list(x.shape)}")
    return axis % x.dim()


def _expect(updates: Tensor, shape: list[int]) -> None:
    if list(updates.shape) != shape:
        raise ValueError(f"updates have shape {list(updates.shape)}, expected {shape}")


@op("scatter_along_axis")
def scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    call: Call,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    """Combine each of `updates` with one value of data along `axis`."""
    del validate_indices  # always validated
    axis = _axis(axis, data)
    _expect(updates, list(indices.shape))
    positions = _positions(indices, data.shape[axis], call)
    order = torch.arange(data.numel()).reshape(data.shape).gather(axis, positions)
    rows = _scatter(data.reshape(-1, 1), order.reshape(-1), updates.reshape(-1, 1), mode)
    return rows.reshape(data.shape)


@op("scatter_nd")
def scatter_nd(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    call: Call,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    """Combine `updates` with slices of data at coordinates."""
    del validate_indices  # always validated
    depth = indices.shape[-1]
    _expect(updates, [*indices.shape[:-1], *data.shape[depth:]])
    at = _flat_positions(indices, data.shape[:depth], call).reshape(-1)
    width = math.prod(data.shape[depth:])
    rows = data.reshape(math.prod(data.shape[:depth]), width)
    return _scatter(rows, at, updates.reshape(at.numel(), width), mode).reshape(data.shape)
