"""Random cases of ops that move values: shapes, joins, slices, gathers, scatters, blocks of space, fills and sorts."""

from __future__ import annotations

import itertools
import math

import numpy as np

from tests.helpers.mil_draws import Drawn, Rng, axis_of, draws, floats, ints, numbers, pick, shape


@draws("shape")
def shape_of(rng: Rng, op: str) -> Drawn:
    x = numbers(rng, shape(rng, 0, 5))
    return Drawn({"x": x}, np.array(x.shape, np.int32))


@draws("reshape")
def reshape(rng: Rng, op: str) -> Drawn:
    x = numbers(rng, shape(rng))
    target = [int(size) for size in rng.permutation(x.shape)] if x.size else list(x.shape)
    if rng.random() < 0.5:
        target.insert(int(rng.integers(len(target) + 1)), 1)
    asked, ios = list(target), int(pick(rng, 15, 17, 18))
    offset = x.ndim - len(target)
    for place, size in enumerate(target):
        source = place + offset
        inherited = x.shape[source] if 0 <= source < x.ndim else 1
        if (ios >= 17 or offset == 0) and size == inherited and rng.random() < 0.5:
            asked[place] = 0
    if ios < 17 and offset and 0 in asked:
        ios = 17
    if asked and x.size and rng.random() < 0.4:
        asked[int(rng.integers(len(asked)))] = -1
    if offset and 0 in target:  # an axis of length 0 that cannot be inherited cannot be asked for
        asked, target = list(x.shape), list(x.shape)
    return Drawn({"x": x}, x.reshape(target), {"shape": np.array(asked, np.int32)}, ios)


@draws("reshape_like")
def reshape_like(rng: Rng, op: str) -> Drawn:
    target = shape(rng, 1, 4)
    x = numbers(rng, [math.prod(target)])
    cut = int(rng.integers(len(target)))
    references, begins, ends, masks = [], [], [], []
    for part in (target[:cut], target[cut:]):
        if not part:
            continue
        before, after = shape(rng, 0, 2), shape(rng, 0, 2)
        references.append(floats(rng, [*before, *part, *(after if len(after) else [])]))
        begins.append(np.int32(len(before)))
        ends.append(np.int32(len(before) + len(part)))
        masks.append(np.bool_(not after and rng.random() < 0.5))
    params = {"begins": begins, "ends": ends, "end_masks": masks}
    return Drawn({"x": x, "ref_tensors": references}, x.reshape(target), params)


@draws("transpose")
def transpose(rng: Rng, op: str) -> Drawn:
    x = numbers(rng, shape(rng, 1, 5))
    perm = rng.permutation(x.ndim)
    asked = np.where(rng.random(x.ndim) < 0.4, perm - x.ndim, perm)
    return Drawn({"x": x}, x.transpose(perm), {"perm": asked.astype(np.int32)})


@draws("expand_dims")
def expand_dims(rng: Rng, op: str) -> Drawn:
    x = numbers(rng, shape(rng, 0, 3))
    rank = x.ndim + int(rng.integers(1, 3))
    axes = rng.permutation(rank)[: rank - x.ndim]
    asked = np.where(rng.random(len(axes)) < 0.4, axes - rank, axes)
    return Drawn(
        {"x": x}, np.expand_dims(x, tuple(int(axis) for axis in axes)), {"axes": asked.astype(np.int32)}
    )


@draws("squeeze")
def squeeze(rng: Rng, op: str) -> Drawn:
    sizes = [1 if rng.random() < 0.5 else size for size in shape(rng, 1, 5)]
    x = numbers(rng, sizes)
    ones = [axis for axis, size in enumerate(sizes) if size == 1]
    if not ones or rng.random() < 0.4:
        return Drawn({"x": x}, np.squeeze(x))
    axes = [int(axis) for axis in rng.permutation(ones)[: rng.integers(1, len(ones) + 1)]]
    asked = [axis - x.ndim if rng.random() < 0.4 else axis for axis in axes]
    return Drawn({"x": x}, np.squeeze(x, tuple(axes)), {"axes": np.array(asked, np.int32)})


@draws("flatten2d")
def flatten2d(rng: Rng, op: str) -> Drawn:
    x = numbers(rng, shape(rng, 1, 5))
    axis = axis_of(rng, x.ndim)
    sizes = math.prod(x.shape[:axis]), math.prod(x.shape[axis:])
    return Drawn({"x": x}, x.reshape(sizes), {"axis": axis})


@draws("reverse")
def reverse(rng: Rng, op: str) -> Drawn:
    x = numbers(rng, shape(rng, 1))
    if rng.random() < 0.3:
        return Drawn({"x": x}, np.flip(x))
    axes = [int(axis) for axis in rng.permutation(x.ndim)[: rng.integers(1, x.ndim + 1)]]
    asked = [axis - x.ndim if rng.random() < 0.4 else axis for axis in axes]
    return Drawn({"x": x}, np.flip(x, axes), {"axes": np.array(asked, np.int32)})


@draws("tile")
def tile(rng: Rng, op: str) -> Drawn:
    x = numbers(rng, shape(rng, 1))
    reps = rng.integers(1, 4, x.ndim).astype(np.int32)
    return Drawn({"x": x}, np.tile(x, reps), {"reps": reps})


@draws("sliding_windows")
def sliding_windows(rng: Rng, op: str) -> Drawn:
    x = floats(rng, shape(rng, 1, 4, 1, 6))
    axis = axis_of(rng, x.ndim)
    size, stride = int(rng.integers(1, x.shape[axis] + 1)), int(rng.integers(1, 4))
    starts = range(0, x.shape[axis] - size + 1, stride)
    windows = [np.take(x, range(start, start + size), axis) for start in starts]
    return Drawn({"x": x}, np.stack(windows, axis % x.ndim), {"axis": axis, "size": size, "stride": stride})


@draws("concat")
def concat(rng: Rng, op: str) -> Drawn:
    sizes = shape(rng, 1)
    axis = axis_of(rng, len(sizes))
    interleave = bool(rng.random() < 0.3)
    values = []
    for _ in range(int(rng.integers(1, 4))):
        own = list(sizes)
        if not interleave:
            own[axis] = int(rng.integers(0, 4))
        values.append(floats(rng, own))
    if interleave:
        joined = np.stack(values, axis % len(sizes) + 1).reshape(
            [size * len(values) if place == axis % len(sizes) else size for place, size in enumerate(sizes)]
        )
    else:
        joined = np.concatenate(values, axis)
    return Drawn({"values": values}, joined, {"axis": axis, "interleave": interleave})


@draws("stack")
def stack(rng: Rng, op: str) -> Drawn:
    sizes = shape(rng, 0, 3)
    values = [floats(rng, sizes) for _ in range(int(rng.integers(1, 4)))]
    axis = axis_of(rng, len(sizes) + 1)
    return Drawn({"values": values}, np.stack(values, axis), {"axis": axis})


@draws("split")
def split(rng: Rng, op: str) -> Drawn:
    x = floats(rng, shape(rng, 1, 4, 1, 6))
    axis = axis_of(rng, x.ndim)
    if rng.random() < 0.5:
        counts = [count for count in range(1, x.shape[axis] + 1) if x.shape[axis] % count == 0]
        number = int(pick(rng, *counts))
        return Drawn({"x": x}, np.split(x, number, axis), {"axis": axis, "num_splits": number})
    cuts = np.sort(rng.integers(0, x.shape[axis] + 1, int(rng.integers(0, 3))))
    sizes = np.diff([0, *cuts, x.shape[axis]]).astype(np.int32)
    return Drawn({"x": x}, np.split(x, cuts, axis), {"axis": axis, "split_sizes": sizes})


@draws("pad")
def pad(rng: Rng, op: str) -> Drawn:
    mode = pick(rng, "constant", "reflect", "replicate")
    x = floats(rng, shape(rng, 1, 4, 0 if mode == "constant" else 2, 5))
    padded = int(rng.integers(1, x.ndim + 1))
    largest = [4] * padded if mode != "reflect" else [size - 1 for size in x.shape[-padded:]]
    pairs = [rng.integers(0, most + 1, 2).tolist() for most in largest]
    around = [(0, 0)] * (x.ndim - padded) + [tuple(pair) for pair in pairs]
    params = {"pad": np.array(pairs, np.int32).reshape(-1), "mode": mode}
    if mode == "constant":
        params["constant_val"] = np.float32(rng.uniform(-1, 1))
        return Drawn({"x": x}, np.pad(x, around, constant_values=params["constant_val"]), params)
    return Drawn({"x": x}, np.pad(x, around, "edge" if mode == "replicate" else mode), params)


def _slices(rng: Rng, sizes: list[int]) -> tuple[tuple, dict[str, np.ndarray]]:
    """An index of numpy, and the arguments that mean the same."""
    index, begin, end, stride, begin_mask, end_mask, squeeze_mask = [], [], [], [], [], [], []
    for size in sizes:
        first, last = int(rng.integers(-size, size + 1)), int(rng.integers(-size, size + 1))
        step = int(pick(rng, 1, 1, 2, 3, -1, -2))
        from_border, to_border = bool(rng.random() < 0.3), bool(rng.random() < 0.3)
        alone = bool(size and rng.random() < 0.15)
        if alone:
            first, from_border, to_border = int(rng.integers(-size, size)), False, False
        begin.append(first)
        end.append(last)
        stride.append(step)
        begin_mask.append(from_border)
        end_mask.append(to_border)
        squeeze_mask.append(alone)
        index.append(
            first if alone else slice(None if from_border else first, None if to_border else last, step)
        )
    params = {
        "begin": np.array(begin, np.int32),
        "end": np.array(end, np.int32),
        "stride": np.array(stride, np.int32),
        "begin_mask": np.array(begin_mask),
        "end_mask": np.array(end_mask),
        "squeeze_mask": np.array(squeeze_mask),
    }
    return tuple(index), params


@draws("slice_by_index")
def slice_by_index(rng: Rng, op: str) -> Drawn:
    x = numbers(rng, shape(rng, 1, 4, 0, 6))
    index, params = _slices(rng, list(x.shape))
    return Drawn({"x": x}, x[index], params)


@draws("slice_update")
def slice_update(rng: Rng, op: str) -> Drawn:
    x = floats(rng, shape(rng, 1, 4, 0, 6))
    index, params = _slices(rng, list(x.shape))
    update = floats(rng, x[index].shape)
    expected = x.copy()
    expected[index] = update
    return Drawn({"x": x, "update": update}, expected, params)


@draws("slice_by_size")
def slice_by_size(rng: Rng, op: str) -> Drawn:
    x = numbers(rng, shape(rng, 1, 4, 1, 6))
    begin = [int(rng.integers(size)) for size in x.shape]
    size = [int(rng.integers(0, whole - first + 1)) for whole, first in zip(x.shape, begin, strict=True)]
    index = tuple(slice(first, first + count) for first, count in zip(begin, size, strict=True))
    if rng.random() < 0.4:
        place = int(rng.integers(x.ndim))
        size[place] = -1
        index = tuple(slice(one.start, None) if axis == place else one for axis, one in enumerate(index))
    asked = [
        first - whole if rng.random() < 0.3 else first for first, whole in zip(begin, x.shape, strict=True)
    ]
    return Drawn({"x": x}, x[index], {"begin": np.array(asked, np.int32), "size": np.array(size, np.int32)})


@draws("gather")
def gather(rng: Rng, op: str) -> Drawn:
    x, ios = numbers(rng, shape(rng, 1, 4, 1)), int(pick(rng, 15, 16, 17, 18))
    axis = axis_of(rng, x.ndim)
    batch = int(rng.integers(0, axis % x.ndim + 1)) if ios >= 16 and rng.random() < 0.4 else 0
    indices = ints(
        rng, [*x.shape[:batch], *shape(rng, 0, 2)], -x.shape[axis] if ios < 17 else 0, x.shape[axis]
    )
    params: dict[str, int] = {"axis": axis}
    if batch == 0:
        return Drawn({"x": x, "indices": indices}, np.take(x, indices, axis), params, ios)
    rows = [
        np.take(x[place], indices[place], axis % x.ndim - batch) for place in np.ndindex(*x.shape[:batch])
    ]
    each = rows[0].shape
    return Drawn(
        {"x": x, "indices": indices},
        np.stack(rows).reshape(*x.shape[:batch], *each),
        {**params, "batch_dims": batch},
        ios,
    )


@draws("gather_along_axis")
def gather_along_axis(rng: Rng, op: str) -> Drawn:
    x, ios = numbers(rng, shape(rng, 1, 4, 1)), int(pick(rng, 15, 17))
    axis = axis_of(rng, x.ndim)
    sizes = list(x.shape)
    sizes[axis] = int(rng.integers(0, 5))
    indices = ints(rng, sizes, -x.shape[axis] if ios < 17 else 0, x.shape[axis])
    return Drawn({"x": x, "indices": indices}, np.take_along_axis(x, indices, axis), {"axis": axis}, ios)


def _coordinates(rng: Rng, sizes: tuple[int, ...], count: list[int], ios: int) -> np.ndarray:
    columns = [ints(rng, count, -size if ios < 17 else 0, size) for size in sizes]
    return np.stack(columns, -1) if columns else np.zeros([*count, 0], np.int32)


@draws("gather_nd")
def gather_nd(rng: Rng, op: str) -> Drawn:
    x, ios = numbers(rng, shape(rng, 1, 4, 1)), int(pick(rng, 15, 16, 17, 18))
    batch = int(rng.integers(0, x.ndim)) if ios >= 16 and rng.random() < 0.4 else 0
    depth = int(rng.integers(1, x.ndim - batch + 1))
    count = [*x.shape[:batch], *shape(rng, 1, 2)]
    indices = _coordinates(rng, x.shape[batch : batch + depth], count, ios)
    expected = np.empty([*count, *x.shape[batch + depth :]], x.dtype)
    for place in np.ndindex(*count):
        expected[place] = x[(*place[:batch], *indices[place])]
    params = {"batch_dims": batch} if batch else {}
    return Drawn({"x": x, "indices": indices}, expected, params, ios)


MODES = {
    "update": lambda old, new: new,
    "add": lambda old, new: old + new,
    "sub": lambda old, new: old - new,
    "mul": lambda old, new: old * new,
    "div": lambda old, new: old / new if old.dtype.kind == "f" else np.trunc(old / new).astype(old.dtype),
    "max": np.maximum,
    "min": np.minimum,
}


def _operands(rng: Rng, low: int = 1) -> tuple[np.ndarray, str, int]:
    data = numbers(rng, shape(rng, low, 4, 1))
    return data, pick(rng, *MODES), int(pick(rng, 15, 17, 18))


def _updates(rng: Rng, sizes: list[int], like: np.ndarray) -> np.ndarray:
    if like.dtype.kind == "f":
        return floats(rng, sizes, 0.5, 2)
    return ints(rng, sizes, 1, 4)


@draws("scatter")
def scatter(rng: Rng, op: str) -> Drawn:
    data, mode, ios = _operands(rng)
    axis = axis_of(rng, data.ndim)
    at = axis % data.ndim
    indices = ints(rng, shape(rng, 0, 3), -data.shape[axis] if ios < 17 else 0, data.shape[axis])
    updates = _updates(rng, [*data.shape[:at], *indices.shape, *data.shape[at + 1 :]], data)
    expected = data.copy()
    for place in np.ndindex(*indices.shape):
        target = (slice(None),) * at + (indices[place],)
        expected[target] = MODES[mode](expected[target], updates[(slice(None),) * at + place])
    return Drawn(
        {"data": data, "indices": indices, "updates": updates}, expected, {"axis": axis, "mode": mode}, ios
    )


@draws("scatter_along_axis")
def scatter_along_axis(rng: Rng, op: str) -> Drawn:
    data, mode, ios = _operands(rng)
    axis = axis_of(rng, data.ndim)
    sizes = list(data.shape)
    sizes[axis] = int(rng.integers(0, 5))
    indices = ints(rng, sizes, -data.shape[axis] if ios < 17 else 0, data.shape[axis])
    updates = _updates(rng, sizes, data)
    expected = data.copy()
    for place in np.ndindex(*sizes):
        target = list(place)
        target[axis] = int(indices[place])
        expected[tuple(target)] = MODES[mode](expected[tuple(target)], updates[place])
    return Drawn(
        {"data": data, "indices": indices, "updates": updates}, expected, {"axis": axis, "mode": mode}, ios
    )


@draws("scatter_nd")
def scatter_nd(rng: Rng, op: str) -> Drawn:
    data, mode, ios = _operands(rng)
    depth = int(rng.integers(1, data.ndim + 1))
    count = shape(rng, 1, 2)
    indices = _coordinates(rng, data.shape[:depth], count, ios)
    updates = _updates(rng, [*count, *data.shape[depth:]], data)
    expected = data.copy()
    for place in np.ndindex(*count):
        target = tuple(int(one) for one in indices[place])
        expected[target] = MODES[mode](expected[target], updates[place])
    return Drawn({"data": data, "indices": indices, "updates": updates}, expected, {"mode": mode}, ios)


@draws("pixel_shuffle", "depth_to_space")
def out_of_channels(rng: Rng, op: str) -> Drawn:
    n, c, h, w = rng.integers(1, 4, 4)
    block = int(rng.integers(2, 4))
    x = floats(rng, [n, c * block**2, h, w])
    expected = np.empty([n, c, h * block, w * block], np.float32)
    for channel, row, column in itertools.product(range(c), range(block), range(block)):
        inner = row * block + column
        source = channel * block**2 + inner if op == "pixel_shuffle" else inner * c + channel
        expected[:, channel, row::block, column::block] = x[:, source]
    name = "upscale_factor" if op == "pixel_shuffle" else "block_size"
    return Drawn({"x": x}, expected, {name: block})


@draws("pixel_unshuffle", "space_to_depth")
def into_channels(rng: Rng, op: str) -> Drawn:
    drawn = out_of_channels(rng, "pixel_shuffle" if op == "pixel_unshuffle" else "depth_to_space")
    block = next(iter(drawn.params.values()))
    name = "downscale_factor" if op == "pixel_unshuffle" else "block_size"
    return Drawn({"x": drawn.expected}, drawn.inputs["x"], {name: block})


@draws("space_to_batch", "batch_to_space")
def batch_blocks(rng: Rng, op: str) -> Drawn:
    n, c, h, w = (int(size) for size in rng.integers(1, 4, 4))
    rows, columns = (int(size) for size in rng.integers(1, 4, 2))
    x = floats(rng, [n, c, h * rows, w * columns])
    split_up = np.empty([n * rows * columns, c, h, w], np.float32)
    for row, column, image in itertools.product(range(rows), range(columns), range(n)):
        split_up[(row * columns + column) * n + image] = x[image, :, row::rows, column::columns]
    margins = rng.integers(0, 2, (2, 2)).astype(np.int32) * (np.array([[h * rows], [w * columns]]) > 2)
    (top, bottom), (left, right) = margins.tolist()
    inner = x[:, :, top : h * rows - bottom, left : w * columns - right]
    params = {"block_shape": np.array([rows, columns], np.int32)}
    if op == "batch_to_space":
        return Drawn({"x": split_up}, inner, {**params, "crops": margins.astype(np.int32)})
    padded = np.pad(inner, [(0, 0), (0, 0), (top, bottom), (left, right)])
    for row, column, image in itertools.product(range(rows), range(columns), range(n)):
        split_up[(row * columns + column) * n + image] = padded[image, :, row::rows, column::columns]
    return Drawn({"x": inner}, split_up, {**params, "paddings": margins.astype(np.int32)})


@draws("crop")
def crop(rng: Rng, op: str) -> Drawn:
    x = floats(rng, [*shape(rng, 1, 3), *rng.integers(1, 6, 2)])
    height = np.sort(rng.integers(0, x.shape[-2] + 1, 2))
    width = np.sort(rng.integers(0, x.shape[-1] + 1, 2))
    params = {
        "crop_height": np.array([height[0], x.shape[-2] - height[1]], np.int32),
        "crop_width": np.array([width[0], x.shape[-1] - width[1]], np.int32),
    }
    return Drawn({"x": x}, x[..., height[0] : height[1], width[0] : width[1]], params)


@draws("reverse_sequence")
def reverse_sequence(rng: Rng, op: str) -> Drawn:
    x = floats(rng, shape(rng, 2, 4, 1, 5))
    seq, batch = (int(axis) for axis in rng.permutation(x.ndim)[:2])
    lengths = ints(rng, [x.shape[batch]], 0, x.shape[seq] + 1)
    expected = np.moveaxis(x.copy(), (batch, seq), (0, 1))
    for place, count in enumerate(lengths):
        expected[place, :count] = expected[place, :count][::-1].copy()
    asked = {"seq_axis": seq - x.ndim if rng.random() < 0.3 else seq, "batch_axis": batch}
    return Drawn({"x": x, "lengths": lengths}, np.moveaxis(expected, (0, 1), (batch, seq)), asked)


@draws("band_part")
def band_part(rng: Rng, op: str) -> Drawn:
    x = floats(rng, [*shape(rng, 0, 2), *rng.integers(1, 5, 2)])
    lower, upper = (int(value) for value in rng.integers(-1, 4, 2))
    row, column = np.indices(x.shape[-2:])
    keep = ((lower < 0) | (row - column <= lower)) & ((upper < 0) | (column - row <= upper))
    return Drawn({"x": x}, np.where(keep, x, 0).astype(np.float32), {"lower": lower, "upper": upper})


@draws("fill", "fill_like")
def fill(rng: Rng, op: str) -> Drawn:
    sizes = shape(rng, 1, 4)
    value = pick(rng, np.float32(1.5), np.int32(-3), np.bool_(True))
    expected = np.full(sizes, value)
    if op == "fill":
        return Drawn({}, expected, {"shape": np.array(sizes, np.int32), "value": value})
    return Drawn({"ref_tensor": floats(rng, sizes)}, expected, {"value": value})


@draws("range_1d")
def range_1d(rng: Rng, op: str) -> Drawn:
    if rng.random() < 0.5:
        start, end, step = (
            np.int32(value) for value in (*rng.integers(-9, 10, 2), pick(rng, 1, 2, 3, -1, -2))
        )
        return Drawn({"start": start, "end": end, "step": step}, np.arange(start, end, step, dtype=np.int32))
    start, step = np.float32(rng.integers(-3, 4)), np.float32(pick(rng, 0.1, 0.25, 0.3, -0.2))
    count = int(rng.integers(0, 9))
    end = np.float32(start + np.float32(count) * step)  # as close as float32 comes
    wanted = max(int(np.ceil(np.float32(end - start) / step)), 0)
    expected = (start + np.arange(wanted) * step.astype(np.float64)).astype(np.float32)
    return Drawn({"start": start, "end": end, "step": step}, expected, tolerance=1e-6)


@draws("one_hot")
def one_hot(rng: Rng, op: str) -> Drawn:
    sizes, count = shape(rng, 0, 3), int(rng.integers(1, 5))
    indices = ints(rng, sizes, 0, count)
    axis = axis_of(rng, len(sizes) + 1)
    on, off = np.float32(rng.uniform(1, 2)), np.float32(rng.uniform(-1, 0))
    hits = indices[..., None] == np.arange(count)
    expected = np.where(np.moveaxis(hits, -1, axis), on, off)
    params = {"one_hot_vector_size": count, "axis": axis, "on_value": on, "off_value": off}
    return Drawn({"indices": indices}, expected, params)


@draws("non_zero")
def non_zero(rng: Rng, op: str) -> Drawn:
    x = ints(rng, shape(rng, 1, 4), 0, 2)
    return Drawn({"x": x}, np.argwhere(x).astype(np.int32))


@draws("argsort")
def argsort(rng: Rng, op: str) -> Drawn:
    x = pick(rng, floats, ints)(rng, shape(rng, 1, 4))
    axis, ascending = axis_of(rng, x.ndim), bool(rng.random() < 0.5)
    order = np.argsort(x if ascending else -x, axis, kind="stable")
    return Drawn({"x": x}, order.astype(np.int32), {"axis": axis, "ascending": ascending})


@draws("topk")
def topk(rng: Rng, op: str) -> Drawn:
    x = floats(rng, shape(rng, 1, 4, 1, 6))
    axis, ascending = axis_of(rng, x.ndim), bool(rng.random() < 0.5)
    k = int(rng.integers(1, x.shape[axis] + 1))
    order = np.take(np.argsort(x if ascending else -x, axis, kind="stable"), range(k), axis)
    params = {"k": k, "axis": axis, "ascending": ascending}
    return Drawn({"x": x}, [np.take_along_axis(x, order, axis), order.astype(np.int32)], params)
