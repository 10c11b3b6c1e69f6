"""Random cases of resizing, resampling and the selection of boxes, computed point by point."""

from __future__ import annotations

import math

import numpy as np

from tests.helpers.mil_draws import Drawn, Rng, draws, floats, pick, shape

SAMPLING = ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "DEFAULT", "OFFSET_CORNERS", "UNALIGN_CORNERS")


def grid(mode: str, size: float, count: int) -> list[float]:
    """Points as the documentation of coremltools writes them."""
    points = []
    for i in range(count):
        if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
            spacing = (size - 1) / (count - 1) if count > 1 else 0.0
            point = (size - 1) / 2 if count == 1 and mode == "ALIGN_CORNERS" else i * spacing
        elif mode == "DEFAULT":
            point = i * ((size - size / count) / (count - 1)) if count > 1 else 0.0
        elif mode == "OFFSET_CORNERS":
            delta = max(1, size - 1) / count
            point = 0.5 * delta + i * delta
        else:
            spacing = size / count
            point = i * spacing + 0.5 * spacing - 0.5
        points.append(min(size - 1, max(0.0, point)))
    return points


def _resized(x: np.ndarray, axis: int, points: list[float]) -> np.ndarray:
    parts = []
    for point in points:
        low = math.floor(point)
        high, weight = min(low + 1, x.shape[axis] - 1), point - low
        parts.append(np.take(x, low, axis) * (1 - weight) + np.take(x, high, axis) * weight)
    return np.stack(parts, axis)


def _picked(x: np.ndarray, axis: int, count: int) -> np.ndarray:
    """Elements in whose middle the centers of the new ones lie."""
    size = x.shape[axis]
    return np.take(x, [math.floor((2 * i + 1) * size / (2 * count)) for i in range(count)], axis)


def _image(rng: Rng, low: int = 1, high: int = 3) -> np.ndarray:
    return floats(rng, [*shape(rng, low, high, 1, 2), *rng.integers(1, 6, 2)])


@draws("resize_bilinear", "resize_nearest_neighbor")
def resize_last_two(rng: Rng, op: str) -> Drawn:
    x, (height, width) = _image(rng), (int(size) for size in rng.integers(1, 8, 2))
    params: dict[str, object] = {"target_size_height": height, "target_size_width": width}
    if op == "resize_nearest_neighbor":
        return Drawn({"x": x}, _picked(_picked(x, x.ndim - 2, height), x.ndim - 1, width), params)
    mode = pick(rng, *SAMPLING)
    wide = _resized(x.astype(np.float64), x.ndim - 2, grid(mode, x.shape[-2], height))
    wide = _resized(wide, x.ndim - 1, grid(mode, x.shape[-1], width))
    return Drawn({"x": x}, wide, {**params, "sampling_mode": mode})


@draws("upsample_bilinear", "upsample_nearest_neighbor")
def upsample(rng: Rng, op: str) -> Drawn:
    x = _image(rng)
    factors = [
        pick(rng, np.int32(1), np.int32(2), np.int32(3), np.float32(1.5), np.float32(2.25)) for _ in range(2)
    ]
    counts = [math.floor(float(factor) * size) for factor, size in zip(factors, x.shape[-2:], strict=True)]
    params = dict(zip(("scale_factor_height", "scale_factor_width"), factors, strict=True))
    wide = x.astype(np.float64)
    if op == "upsample_nearest_neighbor":
        for axis, count in zip((x.ndim - 2, x.ndim - 1), counts, strict=True):
            wide = np.take(wide, [i * x.shape[axis] // count for i in range(count)], axis)
        return Drawn({"x": x}, wide, params)
    corners = bool(rng.random() < 0.5)
    for axis, count in zip((x.ndim - 2, x.ndim - 1), counts, strict=True):
        mode = "STRICT_ALIGN_CORNERS" if corners else "UNALIGN_CORNERS"
        wide = _resized(wide, axis, grid(mode, x.shape[axis], count))
    return Drawn({"x": x}, wide, {**params, "align_corners": corners})


@draws("resize")
def resize(rng: Rng, op: str) -> Drawn:
    x = floats(rng, shape(rng, 1, 4, 1, 5))
    dims = int(rng.integers(1, x.ndim + 1))
    given = [int(size) for size in rng.integers(0, 7, int(rng.integers(dims, x.ndim + 1)))]
    nearest, mode = bool(rng.random() < 0.4), pick(rng, *SAMPLING)
    wide = x.astype(np.float64)
    for offset in range(1, dims + 1):
        axis, count = x.ndim - offset, given[-offset] or x.shape[-offset]
        points = grid(mode, x.shape[axis], count)
        wide = _picked(wide, axis, count) if nearest else _resized(wide, axis, points)
    params = {"shape": np.array(given, np.int32), "resized_dims": np.int32(dims)}
    names = {"interpolation_mode": "NEAREST_NEIGHBOR"} if nearest else {"sampling_mode": mode}
    return Drawn({"x": x}, wide, {**params, **names})


def _folded(place: int, size: int, padding: str) -> int | None:
    """The element that an integer position reads."""
    if 0 <= place < size:
        return place
    if padding == "constant":
        return None
    if padding == "border":
        return min(max(place, 0), size - 1)
    period = list(range(size)) + list(range(size - 2, 0, -1))
    if padding == "symmetric":
        period = list(range(size)) + list(range(size - 1, -1, -1))
    return period[place % len(period)]


def _at(image: np.ndarray, row: float, column: float, padding: str, fill: float, nearest: bool) -> np.ndarray:
    """Channels of an image [c, h, w] at a point."""

    def read(y: int, x: int) -> np.ndarray:
        inside = _folded(y, image.shape[1], padding), _folded(x, image.shape[2], padding)
        return np.full(len(image), fill) if None in inside else image[:, inside[0], inside[1]]

    if nearest:
        return read(round(row), round(column))
    top, left = math.floor(row), math.floor(column)
    down, right = row - top, column - left
    return (
        read(top, left) * (1 - down) * (1 - right)
        + read(top, left + 1) * (1 - down) * right
        + read(top + 1, left) * down * (1 - right)
        + read(top + 1, left + 1) * down * right
    )


def _elements(value: float, size: int, mode: str, corners: bool) -> float:
    if mode == "unnormalized":
        return value
    part = (value + 1) / 2 if mode == "normalized_minus_one_to_one" else value
    return part * (size - 1) if corners else part * size - 0.5


@draws("resample")
def resample(rng: Rng, op: str) -> Drawn:
    n, c, h, w = 1, int(rng.integers(1, 3)), *(int(size) for size in rng.integers(2, 5, 2))
    x = floats(rng, [n, c, h, w])
    mode = pick(rng, "unnormalized", "normalized_minus_one_to_one", "normalized_zero_to_one")
    sampling = pick(rng, "bilinear", "nearest")
    padding = pick(rng, "constant", "border", "reflection", "symmetric")
    low, high = {"unnormalized": (-2, 5), "normalized_minus_one_to_one": (-1.6, 1.6)}.get(mode, (-0.3, 1.3))
    coordinates = floats(rng, [n, 2, 3, 2], low, high)
    fill, corners = np.float32(rng.uniform(-1, 1)), bool(rng.random() < 0.5)
    expected = np.empty([n, c, 2, 3])
    for place in np.ndindex(n, 2, 3):
        column, row = (float(value) for value in coordinates[place])
        row, column = _elements(row, h, mode, corners), _elements(column, w, mode, corners)
        expected[place[0], :, place[1], place[2]] = _at(
            x[place[0]], row, column, padding, fill, sampling == "nearest"
        )
    params = {
        "sampling_mode": sampling,
        "padding_mode": padding,
        "padding_value": fill,
        "coordinates_mode": mode,
        "align_corners": corners,
    }
    return Drawn({"x": x, "coordinates": coordinates}, expected, params)


@draws("affine")
def affine(rng: Rng, op: str) -> Drawn:
    n, c, h, w = (int(size) for size in (*rng.integers(1, 3, 2), *rng.integers(2, 5, 2)))
    x, matrix = floats(rng, [n, c, h, w]), floats(rng, [pick(rng, 1, n), 6], -1.2, 1.2)
    rows, columns, fill = int(rng.integers(2, 4)), int(rng.integers(2, 4)), np.float32(rng.uniform(-1, 1))
    expected = np.empty([n, c, rows, columns])
    for image, i, j in np.ndindex(n, rows, columns):
        a = matrix[image % len(matrix)].astype(np.float64)
        across, down = -1 + 2 * j / (columns - 1), -1 + 2 * i / (rows - 1)
        column = _elements(a[0] * across + a[1] * down + a[2], w, "normalized_minus_one_to_one", True)
        row = _elements(a[3] * across + a[4] * down + a[5], h, "normalized_minus_one_to_one", True)
        expected[image, :, i, j] = _at(x[image], row, column, "constant", fill, False)
    params = {
        "output_height": rows,
        "output_width": columns,
        "sampling_mode": "bilinear",
        "padding_mode": "constant",
        "padding_value": fill,
        "coordinates_mode": "normalized_minus_one_to_one",
        "align_corners": True,
    }
    return Drawn({"x": x, "transform_matrix": matrix}, expected, params)


@draws("crop_resize")
def crop_resize(rng: Rng, op: str) -> Drawn:
    n, c, h, w = (int(size) for size in (*rng.integers(1, 3, 2), *rng.integers(2, 6, 2)))
    x, ios = floats(rng, [n, c, h, w]), int(pick(rng, 16, 17))
    normalized, mode = bool(rng.random() < 0.5), pick(rng, *SAMPLING)
    order = pick(
        rng,
        "CORNERS_HEIGHT_FIRST",
        "CORNERS_WIDTH_FIRST",
        "CENTER_SIZE_HEIGHT_FIRST",
        "CENTER_SIZE_WIDTH_FIRST",
    )
    count, rows, columns = 2, int(rng.integers(1, 4)), int(rng.integers(1, 4))
    fill, factor = np.float32(rng.uniform(-1, 1)), np.float32(pick(rng, 1.0, 0.5))
    boxes = np.stack([floats(rng, [count], 0, 1.2 if normalized else most) for most in (h, w, h, w)], 1)
    if order.endswith("WIDTH_FIRST"):
        boxes = boxes[:, [1, 0, 3, 2]]
    image = rng.integers(0, n, count).astype(np.int32)
    expected = np.empty([count, c, rows, columns])
    for box in range(count):
        first = boxes[box].astype(np.float64)
        first = first[[1, 0, 3, 2]] if order.endswith("WIDTH_FIRST") else first
        if order.startswith("CENTER"):
            first = np.concatenate([first[:2] - first[2:] / 2, first[:2] + first[2:] / 2])
        scale = np.array([h - 1, w - 1, h - 1, w - 1]) if normalized else np.ones(4)
        top, left, bottom, right = first * scale * factor
        ys = [top + math.copysign(one, bottom - top) for one in grid(mode, abs(bottom - top) + 1, rows)]
        xs = [left + math.copysign(one, right - left) for one in grid(mode, abs(right - left) + 1, columns)]
        for (i, y), (j, z) in ((one, two) for one in enumerate(ys) for two in enumerate(xs)):
            inside = 0 <= y <= h - 1 and 0 <= z <= w - 1
            expected[box, :, i, j] = _at(x[image[box]], y, z, "border", 0.0, False) if inside else fill
    params = {
        "target_height": rows,
        "target_width": columns,
        "normalized_coordinates": normalized,
        "spatial_scale": factor,
        "box_coordinate_mode": order,
        "sampling_mode": mode,
        "pad_value": fill,
    }
    if ios >= 17:
        return Drawn({"x": x, "boxes": boxes, "box_indices": image}, expected, params, ios, 1e-4)
    roi = np.concatenate([image[:, None].astype(np.float32), boxes], 1).reshape(count, 1, 5, 1, 1)
    return Drawn({"x": x, "roi": roi}, expected[:, None], params, ios, 1e-4)


def _overlap(one: np.ndarray, two: np.ndarray) -> float:
    sides = []
    for axis in (0, 1):
        low = max(one[axis] - one[axis + 2] / 2, two[axis] - two[axis + 2] / 2)
        high = min(one[axis] + one[axis + 2] / 2, two[axis] + two[axis + 2] / 2)
        sides.append(max(high - low, 0))
    shared = sides[0] * sides[1]
    union = one[2] * one[3] + two[2] * two[3] - shared
    return shared / union if union > 0 else 0.0


@draws("non_maximum_suppression")
def non_maximum_suppression(rng: Rng, op: str) -> Drawn:
    n, b, k = (int(size) for size in (rng.integers(1, 3), rng.integers(1, 9), rng.integers(1, 4)))
    ios, per_class, most = int(pick(rng, 15, 17)), bool(rng.random() < 0.5), int(rng.integers(1, 6))
    boxes, scores = floats(rng, [n, b, 4], 0.5, 4), floats(rng, [n, b, k])
    iou, least = np.float32(rng.uniform(0.1, 0.6)), np.float32(rng.uniform(-1, 2))
    out_boxes, out_scores = np.zeros([n, most, 4], np.float32), np.zeros([n, most, k], np.float32)
    indices, counts = np.full([n, most], -1, np.int32), np.zeros(n, np.int32)
    for image in range(n):
        best, kind = scores[image].max(1), scores[image].argmax(1)
        order = np.argsort(-best, kind="stable").tolist()
        if ios < 17:
            order = [one for one in order if best[one] > least] or order[:1]
        kept: list[int] = []
        for one in order:
            rivals = [other for other in kept if not per_class or kind[one] == kind[other]]
            if all(_overlap(boxes[image, one], boxes[image, other]) <= iou for other in rivals):
                kept.append(one)
        kept = kept[:most]
        out_boxes[image, : len(kept)], out_scores[image, : len(kept)] = (
            boxes[image, kept],
            scores[image, kept],
        )
        indices[image, : len(kept)], counts[image] = kept, len(kept)
    params = {"iou_threshold": iou, "max_boxes": most, "per_class_suppression": per_class}
    if ios < 17:
        params["score_threshold"] = least
        return Drawn(
            {"boxes": boxes, "scores": scores}, [out_boxes, out_scores, indices, counts], params, ios
        )
    flipped = [value.transpose(0, 2, 1) for value in (boxes, scores, out_boxes, out_scores)]
    return Drawn({"boxes": flipped[0], "scores": flipped[1]}, [*flipped[2:], indices], params, ios)
