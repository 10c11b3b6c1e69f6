"""Slices, and the update of a slice."""

from __future__ import annotations

from torch import Tensor

from converters.coreml.read.ops.registry import Call, OutOfRange, op


def _region(
    x: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None,
    begin_mask: list[bool] | None,
    end_mask: list[bool] | None,
    squeeze_mask: list[bool] | None,
) -> tuple[Tensor, list[int], list[int]]:
    """Find the part of x that a slice covers.

    Returns:
        A view of x with all its axes; the axes to reverse (negative stride, which torch lacks); the axes to
        squeeze.
    """
    rank = x.dim()
    none = [False] * rank
    strides = stride or [1] * rank
    begin_mask, end_mask, squeeze_mask = begin_mask or none, end_mask or none, squeeze_mask or none
    if (
        not len(begin)
        == len(end)
        == len(strides)
        == len(begin_mask)
        == len(end_mask)
        == len(squeeze_mask)
        == rank
    ):
        raise ValueError(f"begin, end, stride and masks must have {rank} entries")
    reversed_axes = []
    for axis, size in enumerate(x.shape):
        first = None if begin_mask[axis] else begin[axis]
        if squeeze_mask[axis]:
            position = first or 0
            if not -size <= position < size:
                raise OutOfRange(f"begin {position} is out of range for axis {axis} of size {size}")
            x = x.narrow(axis, position % size, 1)
            continue
        chosen = range(size)[slice(first, None if end_mask[axis] else end[axis], strides[axis])]
        step = chosen.step
        if step < 0:
            chosen = chosen[::-1]
            reversed_axes.append(axis)
        if len(chosen) == 0:
            x = x.narrow(axis, 0, 0)
        elif len(chosen) < size:
            x = x.narrow(axis, chosen[0], chosen[-1] - chosen[0] + 1)
            if abs(step) > 1:
                x = x[(slice(None),) * axis + (slice(None, None, abs(step)),)]
    return x, reversed_axes, [axis for axis in range(rank) if squeeze_mask[axis]]


@op("slice_by_index", moves=True)
def slice_by_index(
    x: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    """Take x[begin:end:stride] on each axis; masks put the border for begin or end, or take one position."""
    view, reversed_axes, squeezed = _region(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if reversed_axes:
        view = view.flip(reversed_axes)
    return view.squeeze(squeezed) if squeezed else view


@op("slice_update", moves=True)
def slice_update(
    x: Tensor,
    update: Tensor,
    begin: list[int],
    end: list[int],
    call: Call,
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    """Replace what slice_by_index would give by `update`."""
    result = x if call.in_place else x.clone()
    view, reversed_axes, squeezed = _region(result, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    expected = [size for axis, size in enumerate(view.shape) if axis not in squeezed]
    if list(update.shape) != expected:
        raise ValueError(f"update has shape {list(update.shape)}, the slice has {expected}")
    values = update.reshape(view.shape)
    view.copy_(values.flip(reversed_axes) if reversed_axes else values)
    return result


@op("slice_by_size", moves=True)
def slice_by_size(x: Tensor, begin: list[int], size: list[int]) -> Tensor:
    """Take size[i] elements from begin[i] on; -1 takes the rest of the axis."""
    if not len(begin) == len(size) == x.dim():
        raise ValueError(f"begin and size must have {x.dim()} entries")
    for axis, (start, count) in enumerate(zip(begin, size, strict=True)):
        start = start + x.shape[axis] if start < 0 else start
        x = x.narrow(axis, start, x.shape[axis] - start if count == -1 else count)
    return x


@op("sliding_windows", moves=True)
def sliding_windows(x: Tensor, axis: int, size: int, stride: int = 1) -> Tensor:
    """All windows of `size` along `axis`; the positions in a window form the next axis."""
    axis %= x.dim()
    return x.unfold(axis, size, stride).movedim(-1, axis + 1)
