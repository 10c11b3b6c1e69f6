"""Images, [batch, channels, h, w], taken at computed points: resample, affine, and the boxes of crop_resize."""

from __future__ import annotations

import torch
from torch import Tensor

from converters.coreml.read.ops.registry import Call, OutOfRange, UnsupportedForm, op
from converters.coreml.read.ops.resizing import grid_points


def _reflected(points: Tensor, low: float, high: float) -> Tensor:
    """Fold points into [low, high]."""
    span = high - low
    if span <= 0:
        return torch.full_like(points, low)
    folded = (points - low).abs() % (2 * span)
    return torch.where(folded > span, 2 * span - folded, folded) + low


def _inside(points: Tensor, size: int, padding: str) -> Tensor:
    """Where to read for a point, by the padding mode; what lies outside stays there with constant padding."""
    if padding == "constant":
        return points
    if padding == "border":
        return points.clamp(0, size - 1)
    if padding == "reflection":
        return _reflected(points, 0, size - 1)
    if padding == "symmetric":
        return _reflected(points, -0.5, size - 0.5).clamp(0, size - 1)
    raise UnsupportedForm(f"padding_mode {padding!r}")


def _read(x: Tensor, row: Tensor, column: Tensor, fill: float) -> Tensor:
    """x [n, c, h, w] at integer points [n, oh, ow]; `fill` outside."""
    height, width = x.shape[2:]
    known = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    flat = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).flatten(1)
    values = x.flatten(2).gather(2, flat[:, None].expand(-1, x.shape[1], -1))
    values = values.reshape(*x.shape[:2], *row.shape[1:])
    return torch.where(known[:, None], values, torch.tensor(fill, dtype=x.dtype))


def _bilinear(x: Tensor, row: Tensor, column: Tensor, fill: float) -> Tensor:
    top, left = row.floor(), column.floor()
    down, right = (row - top).to(x.dtype)[:, None], (column - left).to(x.dtype)[:, None]
    top, left = top.long(), left.long()
    upper = _read(x, top, left, fill) * (1 - right) + _read(x, top, left + 1, fill) * right
    lower = _read(x, top + 1, left, fill) * (1 - right) + _read(x, top + 1, left + 1, fill) * right
    return upper * (1 - down) + lower * down


def _sample(x: Tensor, row: Tensor, column: Tensor, sampling: str, padding: str, fill: float) -> Tensor:
    """x at points [n, oh, ow] in units of its elements."""
    if 0 in x.shape[2:]:
        raise ValueError(f"an image of {list(x.shape)}")
    row, column = _inside(row, x.shape[2], padding), _inside(column, x.shape[3], padding)
    far = float(max(x.shape[2:]) + 2)  # beyond, everything is padding, and the integers stay small
    row, column = row.nan_to_num(-far).clamp(-far, far), column.nan_to_num(-far).clamp(-far, far)
    if sampling == "bilinear":
        return _bilinear(x, row, column, fill)
    if sampling == "nearest":
        return _read(x, row.round().long(), column.round().long(), fill)
    raise UnsupportedForm(f"sampling_mode {sampling!r}")


def _elements(points: Tensor, size: int, mode: str, align_corners: bool) -> Tensor:
    """Coordinates in units of elements."""
    if mode == "unnormalized":
        return points
    if mode == "normalized_minus_one_to_one":
        points = (points + 1) / 2
    elif mode != "normalized_zero_to_one":
        raise UnsupportedForm(f"coordinates_mode {mode!r}")
    return points * (size - 1) if align_corners else points * size - 0.5


@op("resample")
def resample(
    x: Tensor,
    coordinates: Tensor,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Tensor:
    """x at coordinates [batch, h, w, 2], each (column, row)."""
    points = coordinates.double()
    row = _elements(points[..., 1], x.shape[2], coordinates_mode, align_corners)
    column = _elements(points[..., 0], x.shape[3], coordinates_mode, align_corners)
    return _sample(x, row, column, sampling_mode, padding_mode, padding_value)


@op("affine")
def affine(
    x: Tensor,
    transform_matrix: Tensor,
    output_height: int,
    output_width: int,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Tensor:
    """x at an affine map of the output's coordinates; transform_matrix is [batch or 1, 6]."""
    if coordinates_mode == "unnormalized":
        raise UnsupportedForm("coordinates_mode 'unnormalized'")
    low, high = (-1.0, 1.0) if coordinates_mode == "normalized_minus_one_to_one" else (0.0, 1.0)
    matrix = transform_matrix.double().expand(x.shape[0], 6)[..., None, None]
    vertical, horizontal = (
        _spread(count, low, high, align_corners) for count in (output_height, output_width)
    )
    column = matrix[:, 0] * horizontal + matrix[:, 1] * vertical[:, None] + matrix[:, 2]
    row = matrix[:, 3] * horizontal + matrix[:, 4] * vertical[:, None] + matrix[:, 5]
    return _sample(
        x,
        _elements(row, x.shape[2], coordinates_mode, align_corners),
        _elements(column, x.shape[3], coordinates_mode, align_corners),
        sampling_mode,
        padding_mode,
        padding_value,
    )


def _spread(count: int, low: float, high: float, align_corners: bool) -> Tensor:
    """Coordinates of the elements of an output axis."""
    step = torch.arange(count, dtype=torch.float64)
    part = step / max(count - 1, 1) if align_corners else (step + 0.5) / count
    return low + part * (high - low)


_ORDER = {  # places of (top, left, bottom, right), or of (center row, center column, height, width)
    "CORNERS_HEIGHT_FIRST": (0, 1, 2, 3),
    "CORNERS_WIDTH_FIRST": (1, 0, 3, 2),
    "CENTER_SIZE_HEIGHT_FIRST": (0, 1, 2, 3),
    "CENTER_SIZE_WIDTH_FIRST": (1, 0, 3, 2),
}


@op("crop_resize")
def crop_resize(
    x: Tensor,
    call: Call,
    roi: Tensor | None = None,
    boxes: Tensor | None = None,
    box_indices: Tensor | None = None,
    target_height: int = 1,
    target_width: int = 1,
    normalized_coordinates: bool = False,
    spatial_scale: float = 1.0,
    box_coordinate_mode: str = "CORNERS_HEIGHT_FIRST",
    sampling_mode: str = "DEFAULT",
    pad_value: float = 0.0,
) -> Tensor:
    """Boxes of images, resized; what lies outside the image is `pad_value`.

    Up to iOS 16: `roi` [n, 1, 4 or 5, 1, 1], with the number of the image in front, or each box of every image.
    From iOS 17 on: `boxes` [n, 4] and `box_indices` [n].
    """
    if box_coordinate_mode not in _ORDER:
        raise UnsupportedForm(f"box_coordinate_mode {box_coordinate_mode!r}")
    batch = x.shape[0]
    if roi is not None:
        rows = roi.reshape(roi.shape[0], -1).double()
        every = rows.shape[1] == 4
        corners = rows[:, -4:].repeat_interleave(batch, 0) if every else rows[:, -4:]
        image = torch.arange(batch).repeat(len(rows)) if every else rows[:, 0].long()
    elif boxes is not None:
        corners, every = boxes.double(), False
        image = torch.arange(len(boxes)) if box_indices is None else box_indices.long().reshape(-1)
    else:
        raise ValueError("no boxes")
    if image.numel() and not 0 <= int(image.min()) <= int(image.max()) < batch:
        raise OutOfRange(f"box_indices {image.tolist()} for {batch} images")
    top, left, bottom, right = _corners(corners, box_coordinate_mode)
    if normalized_coordinates:
        top, bottom = top * (x.shape[2] - 1), bottom * (x.shape[2] - 1)
        left, right = left * (x.shape[3] - 1), right * (x.shape[3] - 1)
    row = _points(top * spatial_scale, bottom * spatial_scale, target_height, sampling_mode)
    column = _points(left * spatial_scale, right * spatial_scale, target_width, sampling_mode)
    whole = (len(row), target_height, target_width)
    row, column = row[:, :, None].expand(whole), column[:, None, :].expand(whole)
    outside = (row < 0) | (row > x.shape[2] - 1) | (column < 0) | (column > x.shape[3] - 1)
    values = _sample(x[image], row, column, "bilinear", "border", 0.0)
    values = torch.where(outside[:, None], torch.tensor(pad_value, dtype=x.dtype), values)
    if roi is None:
        return values
    return values.reshape(roi.shape[0], batch if every else 1, *values.shape[1:])


def _corners(boxes: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, second, third, fourth = (boxes[:, place] for place in _ORDER[mode])
    if mode.startswith("CORNERS"):
        return first, second, third, fourth
    return first - third / 2, second - fourth / 2, first + third / 2, second + fourth / 2


def _points(start: Tensor, end: Tensor, count: int, mode: str) -> Tensor:
    """Points of a box, [n, count]; a box whose ends are exchanged is read backwards."""
    length = (end - start).abs()
    within = grid_points(mode, length + 1, count)
    return start[:, None] + torch.where((end < start)[:, None], -within, within)
