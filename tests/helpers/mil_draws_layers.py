"""Random cases of products, convolutions, pools, recurrent layers and attention, computed by loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np

from tests.helpers.mil_draws import Drawn, Rng, draws, floats, ints, pick, shape


@draws("linear")
def linear(rng: Rng, op: str) -> Drawn:
    inner, out = (int(size) for size in rng.integers(1, 5, 2))
    x, weight = floats(rng, [*shape(rng, 0, 3), inner]), floats(rng, [out, inner])
    params = {"weight": weight.astype(np.float16) if rng.random() < 0.3 else weight}
    expected = x.astype(np.float64) @ params["weight"].T
    if rng.random() < 0.6:
        params["bias"] = floats(rng, [out]).astype(params["weight"].dtype)
        expected = expected + params["bias"]
    return Drawn({"x": x}, expected.astype(np.float32), params)


@draws("matmul")
def matmul(rng: Rng, op: str) -> Drawn:
    rows, inner, columns = (int(size) for size in rng.integers(1, 5, 3))
    if rng.random() < 0.15:
        inner = 0
    batch = shape(rng, 0, 2)
    first, second = ([1 if rng.random() < 0.3 else size for size in batch] for _ in range(2))
    flip_x, flip_y = bool(rng.random() < 0.4), bool(rng.random() < 0.4)
    x = floats(rng, [*first, *((inner, rows) if flip_x else (rows, inner))])
    y = floats(rng, [*second, *((columns, inner) if flip_y else (inner, columns))])
    left = np.swapaxes(x, -1, -2) if flip_x else x
    right = np.swapaxes(y, -1, -2) if flip_y else y
    params = {"transpose_x": flip_x, "transpose_y": flip_y}
    if rng.random() < 0.3:
        half = y.astype(np.float16)
        right = np.swapaxes(half, -1, -2) if flip_y else half
        return Drawn(
            {"x": x}, np.matmul(left.astype(np.float64), right).astype(np.float32), {**params, "y": half}
        )
    return Drawn({"x": x, "y": y}, np.matmul(left.astype(np.float64), right), params)


@draws("einsum")
def einsum(rng: Rng, op: str) -> Drawn:
    equation = pick(
        rng, "abcd,adce->abce", "bnqd,bnkd->bnqk", "ab,bc->ac", "i,j->ij", "aij,aij->a", "ijij,iij->ij"
    )
    sizes = {letter: int(rng.integers(1, 4)) for letter in "abcdeijknq"}
    left, right = equation.split("->")[0].split(",")
    values = [floats(rng, [sizes[letter] for letter in letters]) for letters in (left, right)]
    expected = np.einsum(equation, *(value.astype(np.float64) for value in values))
    return Drawn({"values": values}, expected, {"equation": equation})


@draws("scaled_dot_product_attention")
def attention(rng: Rng, op: str) -> Drawn:
    batch = [int(size) for size in rng.integers(1, 3, int(rng.integers(1, 3)))]
    new, total, width, out = (int(size) for size in rng.integers(1, 5, 4))
    q, k, v = (floats(rng, [*batch, *rest]) for rest in ((new, width), (total, width), (total, out)))
    scores = q.astype(np.float64) @ np.swapaxes(k, -1, -2) / math.sqrt(width)
    inputs = {"query": q, "key": k, "value": v}
    kind = pick(rng, "none", "bool", "float")
    if kind == "bool":
        mask = rng.random([new, total]) < 0.6
        mask[:, 0] = True
        inputs["attn_mask"] = np.broadcast_to(mask, [*batch, new, total]).copy()
        scores = np.where(mask, scores, -np.inf)
    elif kind == "float":
        inputs["attn_mask"] = floats(rng, [*batch, new, total])
        scores = scores + inputs["attn_mask"]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return Drawn(inputs, (weights / weights.sum(-1, keepdims=True)) @ v.astype(np.float64))


def _around(kind: str, size: int, reach: int, stride: int, given: list[int]) -> tuple[int, int]:
    """Padding before and after one axis."""
    if kind == "custom":
        return given[0], given[1]
    if kind == "valid":
        return 0, 0
    total = max((math.ceil(size / stride) - 1) * stride + reach - size, 0)
    return (total // 2, total - total // 2) if kind == "same" else (total - total // 2, total // 2)


def _spatial(rng: Rng, rank: int) -> tuple[list[int], list[int], list[int], str, list[list[int]]]:
    kernel = [int(size) for size in rng.integers(1, 4, rank)]
    strides = [int(size) for size in rng.integers(1, 3, rank)]
    sizes = [int(size) for size in rng.integers(5, 8, rank)]
    kind = pick(rng, "valid", "same", "same_lower", "custom")
    pads = [rng.integers(0, width, 2).tolist() for width in kernel]
    return kernel, strides, sizes, kind, pads


@draws("conv")
def conv(rng: Rng, op: str) -> Drawn:
    rank = int(rng.integers(1, 4))
    kernel, strides, sizes, kind, pads = _spatial(rng, rank)
    dilations = [int(pick(rng, 1, 1, 2)) for _ in range(rank)]
    groups, n = int(rng.integers(1, 3)), int(rng.integers(1, 3))
    c_in, c_out = groups * int(rng.integers(1, 3)), groups * int(rng.integers(1, 3))
    x, weight = floats(rng, [n, c_in, *sizes]), floats(rng, [c_out, c_in // groups, *kernel])
    reach = [(width - 1) * dilation + 1 for width, dilation in zip(kernel, dilations, strict=True)]
    around = [_around(kind, *axis) for axis in zip(sizes, reach, strides, pads, strict=True)]
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *around])
    out = [
        (size - width) // stride + 1
        for size, width, stride in zip(padded.shape[2:], reach, strides, strict=True)
    ]
    expected = np.zeros([n, c_out, *out])
    for channel in range(c_out):
        first = channel // (c_out // groups) * (c_in // groups)
        for place in np.ndindex(*kernel):
            window = tuple(
                slice(at * dilation, at * dilation + (count - 1) * stride + 1, stride)
                for at, dilation, count, stride in zip(place, dilations, out, strides, strict=True)
            )
            for inner in range(c_in // groups):
                expected[:, channel] += (
                    weight[(channel, inner, *place)] * padded[(slice(None), first + inner, *window)]
                )
    params = {
        "weight": weight,
        "strides": np.array(strides, np.int32),
        "dilations": np.array(dilations, np.int32),
        "pad_type": kind,
        "groups": groups,
    }
    if kind == "custom":
        params["pad"] = np.array(pads, np.int32).reshape(-1)
    if rng.random() < 0.5:
        params["bias"] = floats(rng, [c_out])
        expected += params["bias"].reshape(-1, *[1] * rank)
    return Drawn({"x": x}, expected, params)


@draws("conv_transpose")
def conv_transpose(rng: Rng, op: str) -> Drawn:
    rank = int(rng.integers(1, 4))
    kernel, strides, sizes, kind, pads = _spatial(rng, rank)
    sizes = [max(size - 3, 1) for size in sizes]
    kind = "valid" if kind == "same_lower" else kind
    dilations = [int(pick(rng, 1, 1, 2)) for _ in range(rank)]
    groups, n = int(rng.integers(1, 3)), int(rng.integers(1, 3))
    c_in, c_out = groups * int(rng.integers(1, 3)), groups * int(rng.integers(1, 3))
    x, weight = floats(rng, [n, c_in, *sizes]), floats(rng, [c_in, c_out // groups, *kernel])
    whole = [
        (size - 1) * stride + (width - 1) * dilation + 1
        for size, stride, width, dilation in zip(sizes, strides, kernel, dilations, strict=True)
    ]
    full = np.zeros([n, c_out, *whole])
    for source, at in itertools.product(np.ndindex(*sizes), np.ndindex(*kernel)):
        target = tuple(
            place * stride + step * dilation
            for place, stride, step, dilation in zip(source, strides, at, dilations, strict=True)
        )
        for channel, inner in itertools.product(range(c_in), range(c_out // groups)):
            out = channel // (c_in // groups) * (c_out // groups) + inner
            full[(slice(None), out, *target)] += (
                x[(slice(None), channel, *source)] * weight[(channel, inner, *at)]
            )
    params = {
        "weight": weight,
        "strides": np.array(strides, np.int32),
        "dilations": np.array(dilations, np.int32),
        "pad_type": kind,
        "groups": groups,
    }
    before = [0] * rank
    wanted = list(whole)
    if kind == "custom":
        pads = [
            [min(pair[0], (size - 1) // 2), min(pair[1], (size - 1) // 2)]
            for pair, size in zip(pads, whole, strict=True)
        ]
        params["pad"] = np.array(pads, np.int32).reshape(-1)
        before = [pair[0] for pair in pads]
        wanted = [size - sum(pair) for size, pair in zip(whole, pads, strict=True)]
    elif kind == "same":
        wanted = [size * stride for size, stride in zip(sizes, strides, strict=True)]
        before = [max(size - target, 0) // 2 for size, target in zip(whole, wanted, strict=True)]
    if rng.random() < 0.3 and kind != "same":
        wanted = [size + int(rng.integers(0, 2)) for size in wanted]
        params["output_shape"] = np.array([n, c_out, *wanted], np.int32)
    expected = np.zeros([n, c_out, *wanted])
    cut = full[
        (
            slice(None),
            slice(None),
            *(slice(first, first + size) for first, size in zip(before, wanted, strict=True)),
        )
    ]
    expected[tuple(slice(0, size) for size in cut.shape)] = cut
    if rng.random() < 0.5:
        params["bias"] = floats(rng, [c_out])
        expected += params["bias"].reshape(-1, *[1] * rank)
    return Drawn({"x": x}, expected, params)


@draws("max_pool", "avg_pool", "l2_pool")
def pool(rng: Rng, op: str) -> Drawn:
    rank = int(rng.integers(1, 3 if op == "l2_pool" else 4))
    kernel, strides, sizes, kind, pads = _spatial(rng, rank)
    pads = [[min(one, width // 2) for one in pair] for pair, width in zip(pads, kernel, strict=True)]
    ceil = bool(rng.random() < 0.5)
    exclude = bool(op == "avg_pool" and rng.random() < 0.5)
    x = floats(rng, [int(rng.integers(1, 3)), int(rng.integers(1, 3)), *sizes])
    around = [_around(kind, *axis) for axis in zip(sizes, kernel, strides, pads, strict=True)]
    counts = []
    for size, width, stride, (before, after) in zip(sizes, kernel, strides, around, strict=True):
        span = size + before + after - width
        count = span // stride + 1
        if ceil and span % stride and count * stride < size + before:
            count += 1
        counts.append(count)
    expected = np.zeros([*x.shape[:2], *counts])
    for place in np.ndindex(*counts):
        window, area = [], 1
        for at, size, width, stride, (before, after) in zip(
            place, sizes, kernel, strides, around, strict=True
        ):
            start = at * stride - before
            window.append(slice(max(start, 0), max(min(start + width, size), 0)))
            area *= min(start + width, size + after) - start
        values = x[(slice(None), slice(None), *window)].astype(np.float64).reshape(*x.shape[:2], -1)
        if op == "max_pool":
            result = values.max(-1, initial=-np.inf)
        elif op == "l2_pool":
            result = np.sqrt((values**2).sum(-1))
        else:
            result = values.sum(-1) / (values.shape[-1] if exclude else area)
        expected[(slice(None), slice(None), *place)] = result
    params = {
        "kernel_sizes": np.array(kernel, np.int32),
        "strides": np.array(strides, np.int32),
        "pad_type": kind,
    }
    params["ceil_mode"] = ceil
    if op == "avg_pool":
        params["exclude_padding_from_average"] = exclude
    if kind == "custom":
        params["pad"] = np.array(pads, np.int32).reshape(-1)
    return Drawn({"x": x}, expected, params)


ACTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "tanh": np.tanh,
    "scaled_tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "linear": lambda x: x,
    "hard_sigmoid": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
}


def _recurrent(rng: Rng, gates: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], int]:
    steps, batch, width, hidden = (int(size) for size in rng.integers(1, 4, 4))
    x = floats(rng, [steps, batch, width], -1, 1)
    params = {"weight_ih": floats(rng, [gates * hidden, width], -1, 1)}
    params["weight_hh"] = floats(rng, [gates * hidden, hidden], -1, 1)
    if rng.random() < 0.7:
        params["bias"] = floats(rng, [gates * hidden], -1, 1)
    return x, floats(rng, [batch, hidden], -1, 1), params, hidden


def _results(states: list[np.ndarray], whole: bool) -> np.ndarray:
    return np.stack(states) if whole else states[-1][None]


@draws("rnn", "gru")
def simple_recurrent(rng: Rng, op: str) -> Drawn:
    gates = 1 if op == "rnn" else 3
    x, h, params, hidden = _recurrent(rng, gates)
    inputs = {"x": x, "initial_h": h}
    direction, whole = pick(rng, "forward", "reverse"), bool(rng.random() < 0.5)
    act, gate = (pick(rng, *ACTS) for _ in range(2))
    after = bool(op == "gru" and rng.random() < 0.5)
    bias = params.get("bias", np.zeros(gates * hidden)).astype(np.float64)
    extra = np.zeros(gates * hidden)
    names = {"direction": direction, "output_sequence": whole, "activation": act}
    if op == "gru":
        names |= {"recurrent_activation": gate, "reset_after": after}
        if rng.random() < 0.5:
            params["input_bias"] = floats(rng, [3 * hidden], -1, 1)
            extra = params["input_bias"].astype(np.float64)
    states = []
    for step in x if direction == "forward" else x[::-1]:
        given = step.astype(np.float64) @ params["weight_ih"].T + extra
        weights = np.split(params["weight_hh"].astype(np.float64), gates)
        if op == "rnn":
            h = ACTS[act](given + h @ weights[0].T + bias)
        else:
            (x_r, x_o, x_z), (b_r, b_o, b_z) = np.split(given, 3, -1), np.split(bias, 3)
            r = ACTS[gate](x_r + h @ weights[0].T + b_r)
            z = ACTS[gate](x_z + h @ weights[2].T + b_z)
            new = r * (h @ weights[1].T + b_o) if after else (r * h) @ weights[1].T + b_o
            h = (1 - z) * ACTS[act](x_o + new) + z * h
        states.append(h)
    return Drawn(inputs, [_results(states, whole), h], {**params, **names})


@draws("lstm")
def lstm(rng: Rng, op: str) -> Drawn:
    x, h, params, hidden = _recurrent(rng, 4)
    direction = pick(rng, "forward", "reverse", "bidirectional")
    ways = 2 if direction == "bidirectional" else 1
    whole, clip = bool(rng.random() < 0.5), pick(rng, None, np.float32(0.3))
    if rng.random() < 0.5:
        params["peephole"] = floats(rng, [3 * hidden], -1, 1)
    if ways == 2:
        params |= {f"{name}_back": floats(rng, value.shape, -1, 1) for name, value in params.items()}
    h, c = (floats(rng, [x.shape[1], ways * hidden], -1, 1) for _ in range(2))
    names = dict(
        zip(
            ("recurrent_activation", "cell_activation", "activation"),
            (pick(rng, *ACTS) for _ in range(3)),
            strict=True,
        )
    )
    gate, cell, out = (ACTS[name] for name in names.values())
    results = []
    for way in range(ways):
        end = "_back" if way else ""
        backwards = direction == "reverse" or way == 1
        state, memory = h[:, way * hidden : (way + 1) * hidden], c[:, way * hidden : (way + 1) * hidden]
        p_i, p_f, p_o = np.split(params.get(f"peephole{end}", np.zeros(3 * hidden)), 3)
        states = []
        for step in x[::-1] if backwards else x:
            mixed = (
                step.astype(np.float64) @ params[f"weight_ih{end}"].T + state @ params[f"weight_hh{end}"].T
            )
            i, f, o, g = np.split(mixed + params.get(f"bias{end}", 0), 4, -1)
            memory = gate(f + p_f * memory) * memory + gate(i + p_i * memory) * cell(g)
            memory = memory if clip is None else np.clip(memory, -clip, clip)
            state = gate(o + p_o * memory) * out(memory)
            states.append(state)
        if way == 1 and whole:
            states = states[::-1]
            results.append((np.stack(states), state, memory))
        else:
            results.append((_results(states, whole), state, memory))
    expected = [np.concatenate(parts, -1) for parts in zip(*results, strict=True)]
    more = {} if clip is None else {"clip": clip}
    inputs = {"x": x, "initial_h": h, "initial_c": c}
    return Drawn(
        inputs, expected, {**params, **names, **more, "direction": direction, "output_sequence": whole}
    )


@draws("quantize", "dequantize")
def quantization(rng: Rng, op: str) -> Drawn:
    sizes = shape(rng, 1, 4, 1)
    axis = None if rng.random() < 0.4 else int(rng.integers(len(sizes)))
    kind, (low, high) = pick(rng, ("int8", (-128, 127)), ("uint8", (0, 255)))
    length = [] if axis is None else [sizes[axis]]
    around = [1] * len(sizes)
    if axis is not None:
        around[axis] = -1
    scale = floats(rng, length, 0.01, 0.1)
    params: dict[str, object] = {"scale": scale}
    zero = np.zeros(length, kind)
    if rng.random() < 0.6:
        zero = np.asarray(ints(rng, length, max(low, -9), 10), kind)
        params["zero_point"] = zero
    if axis is not None:
        params["axis"] = axis - len(sizes) if rng.random() < 0.4 else axis
    wide_scale, wide_zero = (
        value.reshape(around) if axis is not None else value for value in (scale, zero.astype(np.float32))
    )
    if op == "dequantize":
        x = np.asarray(ints(rng, sizes, low, high + 1), kind)
        return Drawn({"input": x}, (x - wide_zero) * wide_scale.astype(np.float64), params)
    x = floats(rng, sizes)
    expected = np.clip(np.round(x / wide_scale) + wide_zero, low, high).astype(kind)
    return Drawn({"input": x}, expected, {**params, "output_dtype": kind})
