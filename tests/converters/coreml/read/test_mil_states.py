"""States of programs in the interpreter: they carry over, update in place, and never become an alias."""

from __future__ import annotations

from pathlib import Path

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, types
from torch import Tensor, nn

from converters.coreml import Package, load_package
from edkm_export.errors import InputError
from tests.helpers.mil_build import convert

# float16 programs, of values up to about 2: weights and each of some ten intermediate values are rounded to 2**-11.
HALF_TOLERANCE = 2e-2


class Cache(nn.Module):
    """Adds rows of x to a cache at [begin, end) and sums what it holds; one entry a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(2, 8, 4))
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor, upto: Tensor) -> Tensor:
        end = upto.shape[-1]
        begin = end - x.shape[0]
        for layer in range(2):
            self.cache[layer : layer + 1, begin:end] = self.mix(x)[None]
            x = x + self.cache[layer, :end].sum(0)
        return x


def _cache_package(path: Path, *, half: bool) -> tuple[Package, Cache]:
    torch.manual_seed(0)
    module = Cache()
    rows, total = ct.RangeDim(1, 8, default=2), ct.RangeDim(1, 8, default=3)
    convert(
        module,
        (torch.randn(2, 4), torch.zeros(1, 3)),
        [ct.TensorType("x", (rows, 4)), ct.TensorType("upto", (1, total))],
        path,
        half=half,
        states=[ct.StateType(ct.TensorType(shape=(2, 8, 4), dtype=np.float16), name="cache")],
    )
    module.cache.zero_()
    return load_package(path), module


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Package, Cache]:
    return _cache_package(tmp_path_factory.mktemp("cache") / "m.mlpackage", half=True)


STEPS = [(0, 3), (3, 4), (4, 8)]


def _drive(package: Package, precision: str, state: dict[str, Tensor], **kwargs) -> list[Tensor]:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(5))
    return [
        next(
            iter(
                package.run(
                    {"x": x[begin:end], "upto": torch.zeros(1, end)},
                    state=state,
                    precision=precision,
                    **kwargs,
                ).values()
            )
        )
        for begin, end in STEPS
    ]


def _reference(module: Cache) -> list[Tensor]:
    module.cache.zero_()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return [module(x[begin:end], torch.zeros(1, end)) for begin, end in STEPS]


@pytest.mark.parametrize("precision", ["float32", "rounded", "float16"])
def test_state_carries_over(precision: str, cached: tuple[Package, Cache]) -> None:
    package, module = cached
    state = package.new_state()
    assert {name: (tuple(value.shape), float(value.abs().sum())) for name, value in state.items()} == {
        "cache": ((2, 8, 4), 0.0)
    }
    found = _drive(package, precision, state)
    # sums of up to 8 float16 values, each off by 2**-11, of size 2
    for mine, theirs in zip(found, _reference(module), strict=True):
        torch.testing.assert_close(mine.float(), theirs, rtol=HALF_TOLERANCE, atol=HALF_TOLERANCE)
    torch.testing.assert_close(state["cache"], module.cache, rtol=HALF_TOLERANCE, atol=HALF_TOLERANCE)
    assert not torch.equal(found[1].float(), _drive(package, precision, package.new_state())[0][:1].float())


def test_state_is_updated_in_place_in_float32_and_shared(cached: tuple[Package, Cache]) -> None:
    package, _ = cached
    state = package.new_state()
    memory = state["cache"].data_ptr()
    whole = _drive(package, "float32", state)
    assert state["cache"].data_ptr() == memory
    again = package.new_state()
    assert float(again["cache"].abs().sum()) == 0.0
    # a copy of the state in the middle gives the same continuation
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(5))
    package.run({"x": x[:3], "upto": torch.zeros(1, 3)}, state=again)
    fork = {name: value.clone() for name, value in again.items()}
    for kept in (again, fork):
        (found,) = package.run({"x": x[3:4], "upto": torch.zeros(1, 4)}, state=kept).values()
        assert torch.equal(found, whole[1])


def test_state_must_be_given_and_fit(cached: tuple[Package, Cache]) -> None:
    package, _ = cached
    inputs = {"x": torch.zeros(1, 4), "upto": torch.zeros(1, 1)}
    with pytest.raises(
        InputError, match=r"has the states cache, found none; pass state=package.new_state\(\)"
    ):
        package.run(inputs)
    with pytest.raises(InputError, match=r"state 'cache' is torch.float32 \[1\]"):
        package.run(inputs, state={"cache": torch.zeros(1)})


def test_flexible_shapes_are_checked(cached: tuple[Package, Cache]) -> None:
    package, _ = cached
    assert str(package.functions["main"].inputs["x"].type) == "float16 [?, 4]"
    assert package.functions["main"].inputs["x"].ranges == ((1, 8), (4, 4))
    with pytest.raises(InputError, match=r"shape \[9, 4\], expected float16 \[\?, 4\] with sizes 1..8, 4..4"):
        package.run({"x": torch.zeros(9, 4), "upto": torch.zeros(1, 8)}, state=package.new_state())


def _state_program(path: Path, body) -> Package:
    """A program over one state `s` float16 [4]; x float16 [2] is written to parts of it."""
    opset = ct.target.iOS18
    with Function(
        {
            "x": mb.placeholder((2,), dtype=types.fp16),
            "s": mb.state_tensor_placeholder((4,), dtype=types.fp16),
        },
        opset_version=opset,
    ) as function:
        result = body(function.inputs["x"], function.inputs["s"])
        function.set_outputs(list(result))
        program = Program()
        program.add_function("main", function)
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=opset,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    model.save(str(path))
    return load_package(path)


def _put(x, update, begin, name):
    return mb.slice_update(x=x, update=update, begin=[begin], end=[begin + 2], name=name)


def test_old_value_of_a_state_outlives_an_update(tmp_path: Path) -> None:
    """The value read first is used after the update: it must not have changed."""

    def body(x, s):
        before = mb.read_state(input=s)
        view = mb.slice_by_index(x=before, begin=[0], end=[2])
        after = mb.coreml_update_state(state=s, value=_put(before, x, 0, "put"))
        return [mb.add(x=view, y=np.float16(0), name="old"), mb.add(x=after, y=np.float16(0), name="new")]

    package = _state_program(tmp_path / "old.mlpackage", body)
    state = {"s": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    outputs = package.run({"x": torch.tensor([8.0, 9.0])}, state=state)
    assert outputs["old"].tolist() == [1.0, 2.0]
    assert outputs["new"].tolist() == state["s"].tolist() == [8.0, 9.0, 3.0, 4.0]


def test_update_that_is_not_written_back_leaves_the_state(tmp_path: Path) -> None:
    def body(x, s):
        changed = _put(mb.read_state(input=s), x, 0, "put")
        again = mb.read_state(input=s)
        return [
            mb.add(x=changed, y=np.float16(0), name="changed"),
            mb.add(x=again, y=np.float16(0), name="again"),
        ]

    package = _state_program(tmp_path / "dry.mlpackage", body)
    state = {"s": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    outputs = package.run({"x": torch.tensor([8.0, 9.0])}, state=state)
    assert outputs["changed"].tolist() == [8.0, 9.0, 3.0, 4.0]
    assert outputs["again"].tolist() == state["s"].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_update_from_the_state_itself(tmp_path: Path) -> None:
    """Overlapping source and target: what is written is what was read."""

    def body(x, s):
        before = mb.read_state(input=s)
        shifted = _put(before, mb.slice_by_index(x=before, begin=[0], end=[2]), 1, "put")
        return [mb.add(x=mb.coreml_update_state(state=s, value=shifted), y=np.float16(0), name="new")]

    package = _state_program(tmp_path / "shift.mlpackage", body)
    state = {"s": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    outputs = package.run({"x": torch.zeros(2)}, state=state)
    assert outputs["new"].tolist() == state["s"].tolist() == [1.0, 1.0, 2.0, 4.0]


def test_state_does_not_become_an_alias_of_an_input(tmp_path: Path) -> None:
    def body(x, s):
        whole = mb.concat(values=[x, x], axis=0)
        written = mb.coreml_update_state(state=s, value=mb.reshape(x=whole, shape=[4]))
        return [mb.add(x=written, y=np.float16(0), name="new")]

    package = _state_program(tmp_path / "alias.mlpackage", body)
    state, x = package.new_state(), torch.tensor([1.0, 2.0])
    package.run({"x": x}, state=state)
    state["s"].zero_()
    assert x.tolist() == [1.0, 2.0]
