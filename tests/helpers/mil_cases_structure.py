"""Ops that move values: shapes, joins, slices, gathers, scatters, fills and sorts."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from tests.helpers.mil_cases import Case, integers, normal

_x = normal(2, 3, 4)
_tall = normal(2, 8, 3, 2)


def _n(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


RESHAPING = [
    Case("shape", {"x": _x}, lambda x: torch.tensor([2, 3, 4], dtype=torch.int32)),
    Case("reshape", {"x": _x}, lambda x: x.reshape(6, 4), {"shape": _n(6, -1)}),
    Case("reshape", {"x": _x}, lambda x: x.reshape(2, 12, 1), {"shape": _n(0, -1, 1)}, note="inherit"),
    Case("transpose", {"x": _x}, lambda x: x.permute(2, 0, 1), {"perm": _n(-1, 0, 1)}),
    Case("expand_dims", {"x": _x}, lambda x: x[None, :, :, None], {"axes": _n(0, 3)}),
    Case("expand_dims", {"x": _x}, lambda x: x[:, :, None, :, None], {"axes": _n(-1, -3)}, note="negative"),
    Case("squeeze", {"x": normal(1, 3, 1, 2)}, lambda x: x[0, :, 0], {"axes": _n(0, -2)}),
    Case("squeeze", {"x": normal(1, 3, 1, 2)}, lambda x: x[0, :, 0], note="all"),
    Case("flatten2d", {"x": _x}, lambda x: x.reshape(6, 4), {"axis": -1}),
    Case("flatten2d", {"x": _x}, lambda x: x.reshape(2, 12), note="default"),
    Case("reverse", {"x": _x}, lambda x: x.flip(0, 2), {"axes": _n(0, -1)}),
    Case("reverse", {"x": _x}, lambda x: x.flip(0, 1, 2), note="all"),
    Case("tile", {"x": _x}, lambda x: torch.cat([torch.cat([x, x], 0)] * 3, 2), {"reps": _n(2, 1, 3)}),
    Case(
        "pixel_shuffle", {"x": _tall}, lambda x: F.pixel_shuffle(x, 2), {"upscale_factor": 2}, inferred=False
    ),
    Case(
        "pixel_unshuffle",
        {"x": normal(1, 2, 4, 6)},
        lambda x: F.pixel_unshuffle(x, 2),
        {"downscale_factor": np.uint32(2)},
        inferred=False,
    ),
    Case(
        "sliding_windows",
        {"x": normal(2, 7, 3)},
        lambda x: torch.stack([x[:, start : start + 3] for start in (0, 2, 4)], 1),
        {"axis": 1, "size": 3, "stride": 2},
        inferred=False,
    ),
]

_pair = {"a": normal(2, 3), "b": normal(2, 3)}

JOINING = [
    Case("concat", _pair, lambda a, b: torch.cat([a, b], 1), {"axis": -1}, tuple_input="values"),
    Case(
        "concat",
        _pair,
        lambda a, b: torch.stack([a, b], 1).reshape(4, 3),
        {"axis": 0, "interleave": True},
        note="interleave",
        tuple_input="values",
        inferred=False,  # coremltools infers as if it were not interleaved
    ),
    Case("stack", _pair, lambda a, b: torch.stack([a, b], -1), {"axis": -1}, tuple_input="values"),
    Case("split", {"x": _x}, lambda x: x.chunk(2, 2), {"axis": -1, "num_splits": 2}),
    Case(
        "split", {"x": _x}, lambda x: x.split([1, 3], 2), {"axis": 2, "split_sizes": _n(1, 3)}, note="sizes"
    ),
    Case(
        "pad",
        {"x": _x},
        lambda x: F.pad(x, (3, 0, 1, 2), value=0.5),
        {"pad": _n(1, 2, 3, 0), "constant_val": 0.5},
    ),
    Case(
        "pad",
        {"x": _x},
        lambda x: F.pad(x, (3, 1, 2, 0), mode="reflect"),
        {"pad": _n(2, 0, 3, 1), "mode": "reflect"},
        note="reflect",
    ),
    Case(
        "pad",
        {"x": _x},
        lambda x: F.pad(x[None], (1, 2, 0, 3), mode="replicate")[0],
        {"pad": _n(0, 0, 0, 3, 1, 2), "mode": "replicate"},
        note="replicate",
    ),
]


def _slice(note: str, reference, begin, end, data=_x, **masks) -> Case:
    params = {"begin": _n(*begin), "end": _n(*end)}
    params |= {name: np.array(values) for name, values in masks.items()}
    return Case("slice_by_index", {"x": data}, reference, params, note=note)


_T, _F = True, False

SLICING = [
    _slice("plain", lambda x: x[:, 1:3, 1:4:2], (0, 1, 1), (2, 3, 4), stride=[1, 1, 2]),
    _slice("negative", lambda x: x[-1:, -3:-1, :], (-1, -3, 0), (2, -1, 4)),
    _slice(
        "masks",
        lambda x: x[:, 1:, :2],
        (1, 1, 3),
        (1, 0, 2),
        begin_mask=[_T, _F, _T],
        end_mask=[_T, _T, _F],
    ),
    _slice(
        "backwards",
        lambda x: x.flip(0)[:, :, [3, 1]],
        (0, 0, 3),
        (0, 3, 0),
        stride=[-1, 1, -2],
        begin_mask=[_T, _F, _F],
        end_mask=[_T, _F, _F],
    ),
    _slice("squeeze", lambda x: x[1, :, -1], (1, 0, -1), (0, 3, 0), squeeze_mask=[_T, _F, _T]),
    _slice("beyond", lambda x: x[:, 2:, :], (0, 2, 0), (2, 99, 4)),
    Case(
        "slice_by_size",
        {"x": _x},
        lambda x: x[1:, 0:2, 1:],
        {"begin": _n(1, 0, 1), "size": _n(1, 2, -1)},
    ),
    Case(
        "slice_update",
        {"x": _x, "update": normal(2, 2, 2)},
        lambda x, update: _updated(x, (slice(None), slice(1, 3), slice(1, 4, 2)), update),
        {"begin": _n(0, 1, 1), "end": _n(2, 3, 4), "stride": _n(1, 1, 2)},
    ),
    Case(
        "slice_update",
        {"x": _x, "update": normal(3, 2)},
        lambda x, update: _updated(x, (1, slice(None), [3, 1]), update),
        {
            "begin": _n(1, 0, 3),
            "end": _n(0, 3, 0),
            "stride": _n(1, 1, -2),
            "squeeze_mask": np.array([_T, _F, _F]),
        },
        note="squeeze",
    ),
]


def _updated(x: torch.Tensor, where: object, update: torch.Tensor) -> torch.Tensor:
    result = x.clone()
    result[where] = update
    return result


_rows = np.array([[2, 0], [1, 1]], np.int32)
_batched = np.array([[0, 2, 1], [1, 1, 0]], np.int32)
_coordinates = np.array([[1, 2], [0, 0], [1, 0]], np.int32)

GATHERING = [
    Case("gather", {"x": _x}, lambda x: x[:, torch.tensor(_rows).long()], {"indices": _rows, "axis": 1}),
    Case("gather", {"x": _x}, lambda x: x[..., 2], {"indices": np.int32(2), "axis": -1}, note="scalar"),
    Case(
        "gather",
        {"x": _x},
        lambda x: x[:, [2, 0]],
        {"indices": _n(-1, -3), "axis": 1},
        note="negative",
        target="iOS16",
    ),
    Case(
        "gather",
        {"x": _x, "indices": _batched},
        lambda x, indices: torch.stack([x[b, indices[b].long()] for b in range(2)]),
        {"axis": 1, "batch_dims": 1},
        note="batch",
    ),
    Case(
        "gather",
        {"x": _x, "indices": _batched},
        lambda x, indices: torch.stack([x[b][:, indices[b].long()] for b in range(2)]),
        {"axis": 2, "batch_dims": 1},
        note="batch_inner",
    ),
    Case(
        "gather_along_axis",
        {"x": normal(2, 3), "indices": _batched},
        lambda x, indices: torch.take_along_dim(x, indices.long(), 1),
        {"axis": -1},
    ),
    Case(
        "gather_nd", {"x": _x}, lambda x: x[[1, 0, 1], [2, 0, 0]], {"indices": _coordinates}, inferred=False
    ),
    Case(
        "gather_nd",
        {"x": _x},
        lambda x: torch.stack([x[0, [1, 0], [3, 2]], x[1, [2, 2], [0, 1]]]),
        {"indices": np.array([[[1, 3], [0, 2]], [[2, 0], [2, 1]]], np.int32), "batch_dims": 1},
        note="batch",
        inferred=False,
    ),
]

_COMBINE = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "max": torch.maximum,
    "min": torch.minimum,
}
_twice = _n(2, 0, 2)
_new = np.abs(normal(2, 3, 4)) + 0.5


def _scattered(x: torch.Tensor, updates: torch.Tensor, mode: str) -> torch.Tensor:
    result = x.clone()
    for source, row in enumerate(_twice):
        result[:, row] = _COMBINE[mode](result[:, row], updates[:, source])
    return result


SCATTERING = [
    *[
        Case(
            "scatter",
            {"data": _x, "updates": _new},
            lambda data, updates, mode=mode: _scattered(data, updates, mode),
            {"indices": _twice, "axis": 1, "mode": mode},
            note=mode,
            inferred=False,
        )
        for mode in ("add", "sub", "mul", "div", "max", "min")
    ],
    Case(
        "scatter",
        {"data": _x, "updates": normal(2, 2, 4)},
        lambda data, updates: _updated(data, (slice(None), [2, 0]), updates),
        {"indices": _n(2, 0), "axis": 1, "mode": "update"},
        note="update",
        inferred=False,
    ),
    Case(
        "scatter_along_axis",
        {"data": normal(2, 3), "updates": normal(2, 2)},
        lambda data, updates: data.scatter(1, torch.tensor([[2, 0], [1, 2]]), updates),
        {"indices": np.array([[2, 0], [1, 2]], np.int32), "axis": 1, "mode": "update"},
    ),
    Case(
        "scatter_nd",
        {"data": _x, "updates": normal(3, 4)},
        lambda data, updates: data.index_put(
            (torch.tensor([1, 0, 1]), torch.tensor([2, 0, 2])), updates, accumulate=True
        ),
        {"indices": np.array([[1, 2], [0, 0], [1, 2]], np.int32), "mode": "add"},
        inferred=False,
    ),
]

CREATION = [
    Case("fill", {"shape": _n(2, 3)}, lambda shape: torch.full((2, 3), 0.5), {"value": 0.5}),
    Case("fill_like", {"ref_tensor": _x}, lambda ref_tensor: torch.full((2, 3, 4), 0.5), {"value": 0.5}),
    Case(
        "range_1d",
        {"end": _n(9)},
        lambda end: torch.arange(2, 9, 3, dtype=torch.int32),
        {"start": 2, "step": 3},
        scalars=("end",),
    ),
    Case(
        "one_hot",
        {"indices": _n(1, 0, 3)},
        lambda indices: F.one_hot(indices.long(), 4).int() * 5 + 2,
        {"one_hot_vector_size": 4, "on_value": 7, "off_value": 2},
        inferred=False,
    ),
    Case(
        "one_hot",
        {"indices": _n(1, 0, 3)},
        lambda indices: F.one_hot(indices.long(), 4).int().T,
        {"one_hot_vector_size": 4, "axis": 0},
        note="axis",
        inferred=False,
    ),
    Case("band_part", {"x": normal(2, 4, 4)}, lambda x: x.tril(1).triu(-2), {"lower": 2, "upper": 1}),
    Case("band_part", {"x": normal(4, 4)}, torch.triu, {"lower": 0, "upper": -1}, note="upper"),
    Case("non_zero", {"x": integers(0, 2, 3, 4)}, lambda x: torch.argwhere(x).int()),
    Case("argsort", {"x": _x}, lambda x: (-x).argsort(1).int(), {"axis": 1}),
    Case("argsort", {"x": _x}, lambda x: x.argsort(-1).int(), {"ascending": True}, note="rising"),
    Case("topk", {"x": _x}, lambda x: _top(x, 2, 1), {"k": 2, "axis": 1}),
    Case("topk", {"x": _x}, lambda x: _top(-x, 3, 2, -1), {"k": 3, "ascending": True}, note="rising"),
]


def _top(x: torch.Tensor, k: int, axis: int, sign: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    values, order = torch.topk(x, k, axis)
    return sign * values, order.int()
