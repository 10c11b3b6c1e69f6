"""Nested blocks, lists, states, classifiers, random numbers and compressed constants, on random cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from converters.coreml.read.block import Block
from converters.coreml.read.program import Operation, Output
from edkm_export.errors import InputError, PackageError
from edkm_export.packing import pack
from tests.helpers.mil_draws import (
    TYPES,
    TensorType,
    any_shape,
    floats,
    ints,
    literal,
    operation,
    pick,
    run,
    shape,
)

CASES = range(50)
LIST = any_shape("float32", "list")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(request.node.callspec.params["case"])


def out(name: str, dtype: str = "float32") -> Output:
    return Output(name, any_shape(dtype))


def make_list(length: int, grows: bool, sizes: list[int]) -> Operation:
    elem_shape = [np.int32(size) for size in sizes]
    arguments = {"init_length": length, "dynamic_length": grows, "elem_shape": elem_shape, "dtype": "fp32"}
    return operation("make_list", arguments, [Output("list", LIST)])


@pytest.mark.parametrize("case", CASES)
def test_lists(case: int, rng: np.random.Generator) -> None:
    sizes, length = shape(rng, 1, 2, 1), int(rng.integers(1, 4))
    grows = bool(rng.random() < 0.5)
    wanted = [np.zeros(sizes, np.float32) for _ in range(length)]
    steps, inputs, name = [make_list(length, grows, sizes)], {}, "list"
    for step in range(int(rng.integers(1, 5))):
        limit = len(wanted) + (2 if grows else 0)
        if rng.random() < 0.6:
            at, value = int(rng.integers(limit)), floats(rng, sizes)
            where = [at]
            arguments: dict[str, Any] = {"index": np.int32(at), "value": f"%value{step}"}
            kind = "list_write"
        else:
            where = [int(one) for one in rng.permutation(limit)[: rng.integers(1, limit + 1)]]
            value, kind = floats(rng, [len(where), *sizes]), "list_scatter"
            arguments = {"indices": np.array(where, np.int32), "value": f"%value{step}"}
        inputs[f"value{step}"] = value
        for place, at in enumerate(where):
            wanted += [np.zeros(sizes, np.float32)] * (at + 1 - len(wanted))
            wanted[at] = value if kind == "list_write" else value[place]
        steps.append(operation(kind, {"ls": f"%{name}", **arguments}, [Output(f"list{step}", LIST)]))
        name = f"list{step}"
    chosen = ints(rng, [3], 0, len(wanted))
    steps += [
        operation("list_length", {"ls": f"%{name}"}, [out("length", "int32")]),
        operation("list_read", {"ls": f"%{name}", "index": chosen[0]}, [out("read")]),
        operation("list_gather", {"ls": f"%{name}", "indices": chosen}, [out("gathered")]),
    ]
    length_, read, gathered = run(steps, inputs, ["length", "read", "gathered"])
    assert int(length_) == len(wanted)
    np.testing.assert_array_equal(read.numpy(), wanted[chosen[0]])
    np.testing.assert_array_equal(gathered.numpy(), np.stack([wanted[at] for at in chosen]))


@pytest.mark.parametrize("grows", [False, True])
def test_list_index_out_of_range(grows: bool) -> None:
    read = operation("list_read", {"ls": "%list", "index": np.int32(3)}, [out("y")])
    with pytest.raises(InputError, match="index 3 is out of range for a list of 2"):
        run([make_list(2, grows, [1]), read], {}, ["y"])
    write = operation(
        "list_write", {"ls": "%list", "index": np.int32(-1), "value": "%x"}, [Output("z", LIST)]
    )
    with pytest.raises(InputError, match="index -1"):
        run([make_list(2, grows, [1]), write], {"x": np.ones(1, np.float32)}, [])


def branch(kind: str, constant: float) -> Block:
    """A block that combines x of around it with a constant of its own; both branches use the same names."""
    value = literal(np.float32(constant))
    made = operation(kind, {"x": "%x", "y": f"%c{kind}"}, [out(f"y{kind}")])
    const = Operation("const", "c", 0, {"val": (value,)}, (Output(f"c{kind}", value.type),))
    return Block((), (f"y{kind}",), (const, made))


@pytest.mark.parametrize("case", CASES)
def test_cond(case: int, rng: np.random.Generator) -> None:
    x, first = floats(rng, shape(rng, 0, 3)), bool(rng.random() < 0.5)
    step = operation("cond", {"pred": "%pred"}, [out("y")], (branch("mul", 2.5), branch("add", 0.5)))
    (found,) = run([step], {"x": x, "pred": np.array(first)}, ["y"])
    np.testing.assert_allclose(found.numpy(), x * 2.5 if first else x + 0.5, rtol=1e-6)


def loop(limit: int, sizes: list[int]) -> Operation:
    """While i < limit: i, total = i + 1, total * step + i; `step` lies outside."""
    given = (Output("i", TensorType(TYPES["int32"], ())), Output("total", any_shape("float32")))
    condition = Block(
        given, ("more",), (operation("less", {"x": "%i", "y": np.int32(limit)}, [out("more", "bool")]),)
    )
    later = tuple(Output(f"{one.name}2", one.type) for one in given)
    body = Block(
        later,
        ("next", "sum"),
        (
            operation("add", {"x": "%i2", "y": np.int32(1)}, [out("next", "int32")]),
            operation("cast", {"x": "%i2", "dtype": "fp32"}, [out("as_float")]),
            operation("mul", {"x": "%total2", "y": "%step"}, [out("scaled")]),
            operation("add", {"x": "%scaled", "y": "%as_float"}, [out("sum")]),
        ),
    )
    return operation(
        "while_loop", {"loop_vars": ["%start", "%x"]}, [out("count", "int32"), out("y")], (condition, body)
    )


@pytest.mark.parametrize("case", CASES)
def test_while_loop(case: int, rng: np.random.Generator) -> None:
    x, limit, start = floats(rng, shape(rng, 0, 2)), int(rng.integers(0, 6)), int(rng.integers(-2, 3))
    step = np.float32(rng.uniform(0.3, 1))
    inputs = {"x": x, "start": np.array(start, np.int32), "step": np.array(step)}
    count, y = run([loop(limit, list(x.shape))], inputs, ["count", "y"])
    wanted = x.astype(np.float64)
    for i in range(start, limit):
        wanted = wanted * step + i
    assert int(count) == max(limit, start)
    np.testing.assert_allclose(y.numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_an_endless_loop_is_an_error() -> None:
    given = (Output("i", TensorType(TYPES["int32"], ())),)
    always = Block(given, ("more",), (operation("equal", {"x": "%i", "y": "%i"}, [out("more", "bool")]),))
    same = Block((Output("j", given[0].type),), ("j",), ())
    endless = operation("while_loop", {"loop_vars": ["%start"]}, [out("y", "int32")], (always, same))
    with pytest.raises(PackageError, match="while_loop .*the loop has not ended after 100000 steps"):
        run([endless], {"start": np.array(0, np.int32)}, ["y"])


@pytest.mark.parametrize("case", CASES)
def test_states(case: int, rng: np.random.Generator) -> None:
    sizes = shape(rng, 1, 3, 1)
    before, x = floats(rng, sizes), floats(rng, sizes)
    steps = [
        operation("read_state", {"input": "%cache"}, [out("old")]),
        operation("add", {"x": "%old", "y": "%x"}, [out("new")]),
        operation("write_state", {"input": "%cache", "data": "%new"}, []),
        operation("coreml_update_state", {"state": "%other", "value": "%x"}, [out("kept")]),
        operation("read_state", {"input": "%cache"}, [out("now")]),
        operation("read_state", {"input": "%other"}, [out("there")]),
    ]
    states = {"cache": before, "other": np.zeros(sizes, np.float32)}
    old, now, kept, there = run(steps, {"x": x}, ["old", "now", "kept", "there"], states=states)
    np.testing.assert_array_equal(now.numpy(), before + x)
    np.testing.assert_array_equal(old.numpy(), before)
    np.testing.assert_array_equal(kept.numpy(), x)
    np.testing.assert_array_equal(there.numpy(), x)


@pytest.mark.parametrize("case", CASES)
def test_classify(case: int, rng: np.random.Generator) -> None:
    count = int(rng.integers(1, 6))
    classes: tuple[Any, ...] = tuple(f"class {place}" for place in range(count))
    if rng.random() < 0.5:
        classes = tuple(int(one) for one in rng.permutation(100)[:count])
    x = floats(rng, pick(rng, [count], [1, count]))
    outputs = [
        Output("label", any_shape("string")),
        Output("probabilities", any_shape("float64", "dictionary")),
    ]
    step = operation("classify", {"probabilities": "%x", "classes": classes}, outputs)
    label, probabilities = run([step], {"x": x}, ["label", "probabilities"])
    assert label == classes[int(x.argmax())]
    assert probabilities == dict(zip(classes, x.reshape(-1).tolist(), strict=True))


def _check_uniform(values: np.ndarray, low: float, high: float) -> None:
    assert (values >= low).all() and (values < high).all()
    assert abs(values.mean() - (low + high) / 2) < 0.05 * (high - low)


def _check_normal(values: np.ndarray, mean: float, stddev: float) -> None:
    assert abs(values.mean() - mean) < 0.15 * stddev  # six standard errors of 2,000 values
    assert abs(values.std() - stddev) < 0.1 * stddev


def _check_bernoulli(values: np.ndarray, prob: float) -> None:
    assert set(np.unique(values)) <= {0.0, 1.0}
    assert abs(values.mean() - prob) < 0.07


RANDOM: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "random_uniform": (_check_uniform, ("low", "high")),
    "random_normal": (_check_normal, ("mean", "stddev")),
    "random_bernoulli": (_check_bernoulli, ("prob",)),
}


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("case", CASES)
def test_random(kind: str, case: int, rng: np.random.Generator) -> None:
    check, names = RANDOM[kind]
    values = [np.float32(value) for value in np.sort(rng.uniform(0.1, 0.9, len(names)))]
    arguments = {"shape": np.array([40, 50], np.int32), **dict(zip(names, values, strict=True))}
    own = operation(kind, {**arguments, "seed": case}, [out("own")])
    step = operation(kind, arguments, [out("y")])
    y, own_y = run([step, own], {}, ["y", "own"], seed=case)
    check(y.numpy(), *values)
    again, own_again = run([step, own], {}, ["y", "own"], seed=case + 1)
    assert not torch.equal(y, again) and torch.equal(own_y, own_again)
    assert torch.equal(y, run([step], {}, ["y"], seed=case)[0])


@pytest.mark.parametrize("case", CASES)
def test_random_categorical(case: int, rng: np.random.Generator) -> None:
    weights = rng.uniform(0.1, 1, [2, 3]).astype(np.float32)
    weights[:, int(rng.integers(3))] = 0
    mode = pick(rng, "probs", "logits")
    with np.errstate(divide="ignore"):
        x = weights if mode == "probs" else np.log(weights)
    step = operation("random_categorical", {"x": "%x", "mode": mode, "size": 1500}, [out("y")])
    (y,) = run([step], {"x": x}, ["y"], seed=case)
    assert tuple(y.shape) == (2, 1500)
    for row in range(2):
        share = np.bincount(y[row].int().numpy(), minlength=3) / 1500
        np.testing.assert_allclose(share, weights[row] / weights[row].sum(), atol=0.08)


def constexpr(kind: str, arguments: dict[str, Any], types: list[TensorType]) -> list[Any]:
    """Decode a constant of these types; each output goes through an identity."""
    names = [f"c{place}" for place in range(len(types))]
    made = operation(kind, arguments, [Output(name, one) for name, one in zip(names, types, strict=True)])
    steps = [
        operation("identity", {"x": f"%{name}"}, [out(f"y{place}", types[place].dtype.name)])
        for place, name in enumerate(names)
    ]
    return run([made, *steps], {}, [f"y{place}" for place in range(len(types))])


def _lut(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, dict[str, Any]]:
    """Indices, a LUT, the dense weight, the bits, and the vector axis."""
    rank, bits = int(rng.integers(1, 4)), int(pick(rng, 1, 2, 3, 4, 6, 8))
    groups, each = rng.integers(1, 3, rank), rng.integers(1, 3, rank)
    indices = np.asarray(rng.integers(0, 2**bits, groups * each), np.uint8)
    size = int(pick(rng, 1, 1, 2))
    lut = floats(rng, [*groups, 2**bits, size])
    axis = int(rng.integers(rank))
    dense = np.zeros([*indices.shape, size], np.float32)
    for place in np.ndindex(*indices.shape):
        group = tuple(at // count for at, count in zip(place, each, strict=True))
        dense[place] = lut[(*group, indices[place])]
    moved = np.moveaxis(dense, -1, axis + 1)
    sizes = [count * (size if place == axis else 1) for place, count in enumerate(indices.shape)]
    extra = {} if size == 1 and rng.random() < 0.5 else {"vector_axis": axis}
    return indices, lut, moved.reshape(sizes), bits, extra


def _sparse(rng: np.random.Generator, sizes: tuple[int, ...]) -> np.ndarray:
    return np.asarray(rng.random(sizes) < rng.uniform(0, 1), np.uint8)


def _uint1(sizes: tuple[int, ...]) -> TensorType:
    return TensorType(TYPES["uint1"], sizes)


def _float(sizes: tuple[int, ...]) -> TensorType:
    return TensorType(TYPES["float32"], sizes)


@pytest.mark.parametrize("case", CASES)
def test_lut_to_dense(case: int, rng: np.random.Generator) -> None:
    indices, lut, dense, bits, extra = _lut(rng)
    (found,) = constexpr(
        "constexpr_lut_to_dense", {"indices": indices, "lut": lut, **extra}, [_float(dense.shape)]
    )
    np.testing.assert_array_equal(found.numpy(), dense)
    if lut.shape[-1] == 1 and lut.size == lut.shape[-2]:  # one LUT: the form of iOS 16
        stream = pack(torch.from_numpy(indices.reshape(-1)), bits).numpy()
        sizes = np.array(indices.shape, np.uint32)
        old = {"indices": stream, "lut": lut.reshape(-1), "shape": sizes.astype(np.int32)}
        (found,) = constexpr("constexpr_lut_to_dense", old, [_float(dense.shape)])
        np.testing.assert_array_equal(found.numpy(), dense)


@pytest.mark.parametrize("case", CASES)
def test_lut_to_sparse(case: int, rng: np.random.Generator) -> None:
    indices, lut, dense, _, extra = _lut(rng)
    mask = _sparse(rng, indices.shape)
    spread = np.repeat(mask, lut.shape[-1], extra["vector_axis"]) if extra else mask
    wanted = dense[spread != 0]
    arguments = {"indices_mask": mask, "indices_nonzero_data": indices[mask != 0], "lut": lut, **extra}
    found_mask, values = constexpr(
        "constexpr_lut_to_sparse", arguments, [_uint1(spread.shape), _float(wanted.shape)]
    )
    np.testing.assert_array_equal(found_mask.numpy(), spread)
    np.testing.assert_array_equal(values.numpy(), wanted)


@pytest.mark.parametrize("case", CASES)
def test_sparse_to_dense(case: int, rng: np.random.Generator) -> None:
    dense = floats(rng, shape(rng, 1, 3, 1))
    mask = _sparse(rng, dense.shape)
    values, wanted = dense[mask != 0], np.where(mask, dense, 0)
    arguments: dict[str, Any] = {"nonzero_data": values, "mask": mask}
    if rng.random() < 0.5:  # the form of iOS 16
        bits = np.packbits(mask.reshape(-1), bitorder="little")
        arguments = {"nonzero_data": values, "mask": bits, "shape": np.array(dense.shape, np.int32)}
    (found,) = constexpr("constexpr_sparse_to_dense", arguments, [_float(dense.shape)])
    np.testing.assert_array_equal(found.numpy(), wanted)


def _blockwise(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    rank = int(rng.integers(1, 4))
    blocks, each = rng.integers(1, 3, rank), rng.integers(1, 4, rank)
    data = np.asarray(rng.integers(-8, 8, blocks * each), np.int8)
    scale = floats(rng, blocks, 0.1, 1)
    offset = np.asarray(rng.integers(-3, 4, blocks), np.int8) if rng.random() < 0.5 else None
    wanted = np.zeros(data.shape, np.float32)
    for place in np.ndindex(*data.shape):
        block = tuple(at // count for at, count in zip(place, each, strict=True))
        shift = 0 if offset is None else int(offset[block])
        wanted[place] = (float(data[place]) - shift) * scale[block]
    return data, scale, offset, wanted


@pytest.mark.parametrize("case", CASES)
def test_blockwise_shift_scale(case: int, rng: np.random.Generator) -> None:
    data, scale, offset, wanted = _blockwise(rng)
    more = {} if offset is None else {"offset": offset}
    (found,) = constexpr(
        "constexpr_blockwise_shift_scale", {"data": data, "scale": scale, **more}, [_float(wanted.shape)]
    )
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6)
    mask = _sparse(rng, data.shape)
    arguments = {"data_mask": mask, "nonzero_data": data[mask != 0], "scale": scale, **more}
    values = wanted[mask != 0]
    types = [_uint1(mask.shape), _float(values.shape)]
    found_mask, sparse = constexpr("constexpr_sparse_blockwise_shift_scale", arguments, types)
    np.testing.assert_array_equal(found_mask.numpy(), mask)
    np.testing.assert_allclose(sparse.numpy(), values, rtol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_affine_dequantize_and_cast(case: int, rng: np.random.Generator) -> None:
    data = np.asarray(rng.integers(0, 256, shape(rng, 1, 3, 1)), np.uint8)
    axis = int(rng.integers(data.ndim))
    length = [] if rng.random() < 0.5 else [data.shape[axis]]
    around = [1] * data.ndim
    around[axis] = -1
    scale, zero = floats(rng, length, 0.1, 1), np.asarray(rng.integers(0, 256, length), np.uint8)
    wide = [np.asarray(value, np.float32).reshape(around if length else []) for value in (scale, zero)]
    arguments = {"quantized_data": data, "zero_point": zero, "scale": scale, "axis": axis}
    (found,) = constexpr("constexpr_affine_dequantize", arguments, [_float(data.shape)])
    np.testing.assert_allclose(found.numpy(), (data - wide[1]) * wide[0], rtol=1e-6)
    half = data.astype(np.float16)
    (found,) = constexpr("constexpr_cast", {"source_val": half, "output_dtype": "fp32"}, [_float(data.shape)])
    np.testing.assert_array_equal(found.numpy(), half)
