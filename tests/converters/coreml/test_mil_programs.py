"""Whole converted models against PyTorch, in the three precisions; states; several functions."""

from __future__ import annotations

import weakref
from pathlib import Path

import coremltools as ct
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, types
from mil_build import convert, save_program
from torch import Tensor, nn

from converters.coreml import Package, load_package
from converters.coreml.precision import Precision
from edkm_export.errors import InputError

# float32 programs: the same products in another order of summation.
FLOAT32_TOLERANCE = 1e-5
# float16 programs, of values up to about 2: weights and each of some ten intermediate values are rounded to 2**-11.
HALF_TOLERANCE = 2e-2


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(12, 24), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, 8), nn.SiLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.layers(x), -1)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, (3, 2), padding=(1, 0), groups=4, dilation=(1, 2)),
            nn.MaxPool2d(2, padding=1),
            nn.AvgPool2d((2, 1)),
            nn.Flatten(),
        )
        self.body[1].running_mean.normal_()
        self.body[1].running_var.uniform_(0.5, 2)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Attention(nn.Module):
    """Token embedding, RMS norm, rotary positions, grouped attention, tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.qkv = nn.Linear(16, 16 + 2 * 8)
        self.out = nn.Linear(16, 16, bias=False)
        angle = torch.outer(torch.arange(8.0), torch.tensor([1.0, 0.1]))
        self.register_buffer("cos", torch.cat([angle, angle], -1).cos())
        self.register_buffer("sin", torch.cat([angle, angle], -1).sin())

    def rotate(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return x * self.cos + torch.cat([-right, left], -1) * self.sin

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        q, k, v = self.qkv(y).split([16, 8, 8], -1)
        q = self.rotate(q.view(1, 8, 4, 4).transpose(1, 2))
        k = self.rotate(k.view(1, 8, 2, 4).transpose(1, 2)).repeat_interleave(2, 1)
        v = v.view(1, 8, 2, 4).transpose(1, 2).repeat_interleave(2, 1)
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(z.transpose(1, 2).reshape(1, 8, 16))
        return x @ self.embed.weight.T


MODELS = {
    "mlp": (Mlp, {"x": torch.randn(3, 12, generator=torch.Generator().manual_seed(1))}),
    "conv": (ConvNet, {"x": torch.randn(2, 3, 12, 9, generator=torch.Generator().manual_seed(2))}),
    "attention": (
        Attention,
        {
            "ids": torch.randint(0, 32, (1, 8), generator=torch.Generator().manual_seed(3)),
            "mask": torch.full((1, 1, 8, 8), -1e4).triu(1),
        },
    ),
}


def _convert(
    name: str, path: Path, *, half: bool, target: str = "iOS18"
) -> tuple[Package, Tensor, dict[str, Tensor]]:
    kind, inputs = MODELS[name]
    torch.manual_seed(0)
    module = kind().eval()
    types = [
        ct.TensorType(key, value.shape, dtype=np.float32 if value.is_floating_point() else np.int32)
        for key, value in inputs.items()
    ]
    convert(module, tuple(inputs.values()), types, path, half=half, target=target)
    with torch.no_grad():
        return load_package(path), module(*inputs.values()), inputs


@pytest.mark.parametrize("target", ["iOS16", "iOS18"])
@pytest.mark.parametrize("name", MODELS)
def test_float32_model(name: str, target: str, tmp_path: Path) -> None:
    package, expected, inputs = _convert(name, tmp_path / "m.mlpackage", half=False, target=target)
    (found,) = package.run(inputs).values()
    torch.testing.assert_close(found, expected, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_float16_model(name: str, tmp_path: Path) -> None:
    package, expected, inputs = _convert(name, tmp_path / "m.mlpackage", half=True)
    outputs = {
        mode: next(iter(package.run(inputs, precision=mode).values()))
        for mode in ("float32", "rounded", "float16")
    }
    for found in outputs.values():
        torch.testing.assert_close(found.float(), expected, rtol=HALF_TOLERANCE, atol=HALF_TOLERANCE)
    assert not torch.equal(outputs["float32"], outputs["rounded"])


def test_float16_program_in_float32_only_rounds_the_weights(tmp_path: Path) -> None:
    package, _, inputs = _convert("mlp", tmp_path / "m.mlpackage", half=True)
    torch.manual_seed(0)
    module = Mlp().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.half())
        expected = module(inputs["x"])
    (found,) = package.run(inputs).values()
    # epsilon of the layer norm is a float16 constant as well; softmax makes values below 1
    torch.testing.assert_close(found, expected, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_palettized_model(half: bool, tmp_path: Path) -> None:
    """A grouped palette for the tied embedding, and vectors for a linear, in a traced model."""
    rng = np.random.default_rng(0)
    palettes = {
        "embed_weight": {
            "indices": rng.integers(0, 8, (32, 16)).astype(np.uint8),
            "lut": rng.standard_normal((4, 1, 8, 1)).astype(np.float16),
        },
        "qkv_weight": {
            "indices": rng.integers(0, 16, (16, 16)).astype(np.uint8),
            "lut": (rng.standard_normal((1, 1, 16, 2)) * 0.3).astype(np.float16),
            "vector_axis": 0,
        },
    }
    if not half:
        for arrays in palettes.values():
            arrays["lut"] = arrays["lut"].astype(np.float32)
    kind, inputs = MODELS["attention"]
    torch.manual_seed(0)
    module = kind().eval()
    types_ = [ct.TensorType("ids", (1, 8), dtype=np.int32), ct.TensorType("mask", (1, 1, 8, 8))]
    path = convert(
        module, tuple(inputs.values()), types_, tmp_path / "m.mlpackage", half=half, palettes=palettes
    )
    package = load_package(path)
    found = package.palettized()
    assert len(found) == 2
    for parameter in ("embed.weight", "qkv.weight"):
        (key,) = (key for key in found if key.startswith(parameter.replace(".", "_")))
        module.get_parameter(parameter).data = found[key].decode().float()
    with torch.no_grad():
        expected = module(*inputs.values())
    tolerance = HALF_TOLERANCE if half else FLOAT32_TOLERANCE
    (logits,) = package.run(inputs, precision="rounded" if half else "float32").values()
    # the logits reach 40 here
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


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


def test_enumerated_shapes(tmp_path: Path) -> None:
    shapes = ct.EnumeratedShapes([(1, 12), (4, 12)], default=(1, 12))
    convert(Mlp(), (torch.zeros(1, 12),), [ct.TensorType("x", shapes)], tmp_path / "m.mlpackage", half=False)
    package = load_package(tmp_path / "m.mlpackage")
    assert next(iter(package.run({"x": torch.zeros(4, 12)}).values())).shape == (4, 8)
    with pytest.raises(InputError, match=r"shape \[2, 12\], expected one of \[\[1, 12\], \[4, 12\]\]"):
        package.run({"x": torch.zeros(2, 12)})


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


@pytest.fixture(scope="module")
def two_functions(tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp("functions")
    weight = np.random.default_rng(0).standard_normal((16, 12)).astype(np.float16)
    for name, rows in (("prefill", 4), ("decode", 1)):
        save_program(
            folder / f"{name}.mlpackage",
            {"x": np.zeros((rows, 12), np.float16)},
            lambda x: mb.linear(x=x, weight=mb.const(val=weight, name="w"), name="y"),
        )
    descriptor = ct.utils.MultiFunctionDescriptor()
    for name in ("prefill", "decode"):
        descriptor.add_function(str(folder / f"{name}.mlpackage"), "main", name)
    descriptor.default_function_name = "prefill"
    ct.utils.save_multifunction(descriptor, str(folder / "both.mlpackage"))
    return load_package(folder / "both.mlpackage")


def test_several_functions(two_functions: Package) -> None:
    assert set(two_functions.functions) == {"prefill", "decode"}
    assert two_functions.default_function == "prefill"
    x = torch.randn(4, 12)
    whole = two_functions.run({"x": x})["y"]
    rows = [two_functions.run({"x": x[row : row + 1]}, function="decode")["y"] for row in range(4)]
    torch.testing.assert_close(torch.cat(rows), whole, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)
    with pytest.raises(InputError, match=r"no function 'main'; it has decode, prefill"):
        two_functions.run({"x": x}, function="main")


def test_functions_share_decoded_weights(two_functions: Package) -> None:
    for function, rows in (("prefill", 4), ("decode", 1)):
        two_functions.run({"x": torch.zeros(rows, 12)}, function=function)
    held = [two_functions._constants[name].get("w", Precision.FLOAT32) for name in ("prefill", "decode")]
    assert held[0] is held[1]


def test_sizes(two_functions: Package) -> None:
    files = [path for path in two_functions.path.rglob("*") if path.is_file()]
    assert two_functions.size_bytes == sum(path.stat().st_size for path in files)
    weights = two_functions.path / "Data/com.apple.CoreML/weights/weight.bin"
    assert two_functions.weights_size_bytes == weights.stat().st_size


def test_dense_constants_as_stored(two_functions: Package) -> None:
    dense = two_functions.dense("decode")
    assert dense["w"].dtype == torch.float16
    assert dense["w"].shape == (16, 12)
    assert all(value.numel() >= 10 for value in dense.values())


def test_observer_sees_each_op_in_order(two_functions: Package) -> None:
    seen = []
    outputs = two_functions.run(
        {"x": torch.randn(4, 12)},
        observer=lambda op, made: seen.append(
            (op.type, op.line, {name: value.clone() for name, value in made.items()})
        ),
    )
    assert [kind for kind, _, _ in seen] == ["linear"]
    assert torch.equal(seen[0][2]["y"], outputs["y"])


def test_values_are_freed_when_they_are_not_used_again(tmp_path: Path) -> None:
    def body(x):
        for _ in range(20):
            x = mb.sin(x=x)
        return mb.cos(x=x, name="y")

    package = load_package(save_program(tmp_path / "chain.mlpackage", {"x": np.zeros(4, np.float32)}, body))
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def observe(op, made) -> None:
        nonlocal most
        alive.extend(weakref.ref(value) for value in made.values())
        del made
        most = max(most, sum(reference() is not None for reference in alive))

    package.run({"x": torch.zeros(4)}, observer=observe)
    assert len(alive) == 21
    assert most <= 2  # an op's operand and its result


def test_outputs_do_not_alias_the_package(tmp_path: Path) -> None:
    constant = np.arange(12, dtype=np.float32)

    def body(x):
        return [
            mb.add(x=x, y=np.float32(1), name="y"),
            mb.identity(x=mb.const(val=constant, name="c"), name="z"),
        ]

    package = load_package(save_program(tmp_path / "alias.mlpackage", {"x": np.zeros(4, np.float32)}, body))
    package.run({"x": torch.zeros(4)})["z"].fill_(-1)
    assert package.run({"x": torch.zeros(4)})["z"].tolist() == constant.tolist()
