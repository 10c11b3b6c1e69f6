"""Whole converted models against PyTorch, in the three precisions; several functions; what is kept in memory."""

from __future__ import annotations

import weakref
from pathlib import Path

import coremltools as ct
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coremltools.converters.mil import Builder as mb
from torch import Tensor, nn

from converters.coreml import Package, load_package
from converters.coreml.read.precision import Precision
from edkm_export.errors import InputError
from tests.helpers.mil_build import convert, save_program

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


def test_enumerated_shapes(tmp_path: Path) -> None:
    shapes = ct.EnumeratedShapes([(1, 12), (4, 12)], default=(1, 12))
    convert(Mlp(), (torch.zeros(1, 12),), [ct.TensorType("x", shapes)], tmp_path / "m.mlpackage", half=False)
    package = load_package(tmp_path / "m.mlpackage")
    assert next(iter(package.run({"x": torch.zeros(4, 12)}).values())).shape == (4, 8)
    with pytest.raises(InputError, match=r"shape \[2, 12\], expected one of \[\[1, 12\], \[4, 12\]\]"):
        package.run({"x": torch.zeros(2, 12)})


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
