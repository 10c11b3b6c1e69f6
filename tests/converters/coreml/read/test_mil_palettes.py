"""Compressed constants: what is read from disk and what runs, against decoders of a few lines of numpy."""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types

from converters.coreml import Package, load_package
from edkm_export.errors import PackageError
from edkm_export.palette import PalettizedTensor
from tests.helpers.mil_build import lookup, save_program

_rng = np.random.default_rng(7)


@dataclass(frozen=True)
class Palette:
    """One form of a palettized weight: shape of the dense weight, LUTs along each axis, vectors, int8 scale."""

    name: str
    bits: int
    shape: tuple[int, ...] = (16, 24)
    groups: tuple[int, int] = (1, 1)
    dim: int = 1
    scale: tuple[int, int] | None = None
    scale_first: bool = False
    target: str = "iOS18"

    def arrays(self) -> dict[str, Any]:
        """Arguments of `mil_build.lookup`."""
        rng = np.random.default_rng(sum(map(ord, self.name)))
        kernel = (1,) * (len(self.shape) - 2)
        index_shape = (self.shape[0] // self.dim, *self.shape[1:])
        lut_shape = (*self.groups, *kernel, 1 << self.bits, self.dim)
        made: dict[str, Any] = {
            "indices": rng.integers(0, 1 << self.bits, index_shape).astype(np.uint8),
            "lut": rng.standard_normal(lut_shape).astype(np.float16),
            "vector_axis": 0 if self.dim > 1 else None,
        }
        if self.scale is not None:
            made["lut"] = rng.integers(-127, 128, lut_shape).astype(np.int8)
            behind = (1, 1) if self.scale_first else ()
            made["scale"] = (rng.random((*self.scale, *kernel, *behind)) * 0.02 + 1e-3).astype(np.float16)
            made["scale_first"] = self.scale_first
        return made


FORMS = [
    *[Palette(f"pt{bits}", bits) for bits in (1, 2, 3, 4, 6, 8)],
    *[Palette(f"old{bits}", bits, target="iOS16") for bits in (1, 2, 4, 6, 8)],
    *[Palette(f"odd{bits}", bits, shape=(5, 7)) for bits in (1, 2, 3, 6)],
    Palette("old_odd", 6, shape=(5, 7), target="iOS16"),
    Palette("rows", 4, groups=(4, 1)),
    Palette("row", 3, groups=(16, 1)),
    Palette("columns", 4, groups=(1, 3)),
    Palette("both", 2, groups=(4, 6)),
    Palette("vector2", 4, dim=2),
    Palette("vector4", 6, dim=4, groups=(2, 1)),
    Palette("vector2_both", 3, dim=2, groups=(4, 2)),
    Palette("conv", 4, shape=(8, 6, 3, 2), groups=(2, 3)),
    Palette("conv_vector", 2, shape=(8, 6, 1, 1), dim=2, groups=(2, 1)),
    Palette("conv_old", 4, shape=(8, 6, 3, 2), target="iOS16"),
    Palette("int8_tensor", 4, scale=(1, 1)),
    Palette("int8_rows", 4, groups=(4, 1), scale=(4, 1)),
    Palette("int8_coarse", 3, groups=(8, 2), scale=(4, 1)),
    Palette("int8_first", 4, groups=(4, 1), scale=(4, 1), scale_first=True),
    Palette("int8_conv", 4, shape=(8, 6, 1, 1), groups=(4, 1), scale=(4, 1)),
    Palette("int8_vector", 4, dim=2, groups=(2, 1), scale=(2, 1)),
]


def dense_by_hand(arrays: dict[str, Any]) -> np.ndarray:
    """Decode one weight after another, as the documentation of the op tells; float16."""
    indices, lut, axis = arrays["indices"], arrays["lut"], arrays["vector_axis"]
    dim = lut.shape[-1]
    shape = list(indices.shape)
    if dim > 1:
        shape[axis] *= dim
    dense = np.empty(shape, lut.dtype)
    for position in np.ndindex(*indices.shape):
        block = tuple(
            p * groups // size for p, groups, size in zip(position, lut.shape, indices.shape, strict=False)
        )
        for item in range(dim):
            target = list(position)
            if dim > 1:
                target[axis] = position[axis] * dim + item
            dense[tuple(target)] = lut[(*block, indices[position], item)]
    if "scale" not in arrays:
        return dense
    scale = arrays["scale"]
    if arrays["scale_first"]:
        scale = scale[..., 0, 0]
    for axis_, size in enumerate(shape):
        scale = scale.repeat(size // scale.shape[axis_], axis_)
    return (dense.astype(np.float32) * scale.astype(np.float32)).astype(np.float16)


def _body(forms: list[Palette]):
    def body(x: Any) -> list[Any]:
        return [
            mb.add(x=lookup(form.name, None, **form.arrays()), y=x, name=f"{form.name}_dense")
            for form in forms
        ]

    return body


@pytest.fixture(scope="module")
def package_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Package]:
    folder = tmp_path_factory.mktemp("palettes")
    made = {}
    for target in ("iOS16", "iOS18"):
        forms = [form for form in FORMS if form.target == target]
        path = folder / f"{target}.mlpackage"
        save_program(path, {"x": np.zeros(1, np.float16)}, _body(forms), target=target)
        made[target] = load_package(path)
    return made


FORM = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)


@FORM
def test_palette_is_read_bit_for_bit(form: Palette, package_of: dict[str, Package]) -> None:
    arrays = form.arrays()
    found = package_of[form.target].palettized()[form.name]
    assert isinstance(found, PalettizedTensor)
    assert (found.shape, found.n_bits, found.dim, found.groups) == (
        form.shape,
        form.bits,
        form.dim,
        form.groups,
    )
    assert np.array_equal(found.unpack_indices().numpy().ravel(), arrays["indices"].ravel())
    assert found.lut.numpy().tobytes() == arrays["lut"].tobytes()
    assert found.decode().numpy().tobytes() == dense_by_hand(arrays).tobytes()


@FORM
@pytest.mark.parametrize("precision", ["float32", "rounded", "float16"])
def test_interpreter_decodes_the_same_bits(
    form: Palette, precision: str, package_of: dict[str, Package]
) -> None:
    package = package_of[form.target]
    dense = package.run({"x": torch.zeros(1)}, precision=precision)[f"{form.name}_dense"]
    assert np.array_equal(dense.half().numpy(), dense_by_hand(form.arrays()))


@FORM
def test_indices_on_disk(form: Palette, package_of: dict[str, Package]) -> None:
    """The bytes themselves, found with coremltools' protobuf and unpacked with np.unpackbits."""
    package = package_of[form.target]
    spec = ct.utils.load_spec(str(package.path))
    function = spec.mlProgram.functions["main"]
    wanted = {form.name, f"{form.name}_raw"}
    (op,) = (
        op
        for op in function.block_specializations[function.opset].operations
        if op.type == "constexpr_lut_to_dense" and op.outputs[0].name in wanted
    )
    value = op.attributes["indices"] if form.target == "iOS16" else op.inputs["indices"].arguments[0].value
    if value.WhichOneof("value") == "blobFileValue":
        blob = (package.path / "Data/com.apple.CoreML/weights/weight.bin").read_bytes()
        _, _, size, start, _ = struct.unpack_from("<IIQQQ", blob, value.blobFileValue.offset)
        stream = blob[start : start + size]
    else:
        stream = value.immediateValue.tensor.bytes.values
    found = package.palettized()[form.name]
    bits = np.unpackbits(np.frombuffer(stream, np.uint8), bitorder="little")
    count = found.index_shape[0] * found.index_shape[1]
    codes = bits[: count * form.bits].reshape(count, form.bits) @ (1 << np.arange(form.bits))
    assert np.array_equal(codes, found.unpack_indices().numpy().ravel())


def test_palettized_lists_every_palette_and_nothing_else(package_of: dict[str, Package]) -> None:
    for target, package in package_of.items():
        assert set(package.palettized()) == {form.name for form in FORMS if form.target == target}
        assert package.dense() == {}


def _single(path: Path, body: Any, target: str = "iOS18") -> Package:
    return load_package(save_program(path, {"x": np.zeros(1, np.float16)}, body, target=target))


def test_vectors_along_another_axis_run_but_cannot_be_held(tmp_path: Path) -> None:
    arrays = {
        "indices": _rng.integers(0, 16, (6, 4)).astype(np.uint8),
        "lut": _rng.standard_normal((1, 2, 16, 2)).astype(np.float16),
        "vector_axis": 1,
    }
    package = _single(
        tmp_path / "v.mlpackage", lambda x: mb.add(x=lookup("w", None, **arrays), y=x, name="out")
    )
    dense = package.run({"x": torch.zeros(1)}, precision="float16")["out"]
    assert np.array_equal(dense.numpy(), dense_by_hand(arrays))
    with pytest.raises(PackageError, match=r"'w' \(line 0\): w: vectors run along axis 1"):
        package.palettized()


def test_scaled_float_palette_runs_but_cannot_be_held(tmp_path: Path) -> None:
    form = Palette("scaled", 4, groups=(4, 1))
    arrays = form.arrays()
    factor = (_rng.random((16, 1)) + 0.5).astype(np.float16)

    def body(x: Any) -> Any:
        raw = lookup("raw", None, **arrays)
        return mb.add(x=mb.constexpr_blockwise_shift_scale(data=raw, scale=factor, name="w"), y=x, name="out")

    package = _single(tmp_path / "s.mlpackage", body)
    dense = package.run({"x": torch.zeros(1)}, precision="float16")["out"]
    expected = (dense_by_hand(arrays).astype(np.float32) * factor.astype(np.float32)).astype(np.float16)
    assert np.array_equal(dense.numpy(), expected)
    with pytest.raises(PackageError, match=r"w: a torch.float16 LUT is scaled"):
        package.palettized()


def test_scale_finer_than_the_luts_cannot_be_held(tmp_path: Path) -> None:
    arrays = Palette("fine", 4, groups=(2, 1), scale=(8, 1)).arrays()
    package = _single(
        tmp_path / "f.mlpackage", lambda x: mb.add(x=lookup("w", None, **arrays), y=x, name="out")
    )
    with pytest.raises(PackageError, match=r"scale \[8, 1\] is finer than the LUTs \[2, 1\]"):
        package.palettized()


def test_float32_palette_is_held_when_float16_can(tmp_path: Path) -> None:
    arrays = Palette("wide", 4).arrays()
    for offset, fits in ((0.0, True), (2.0**-20, False)):
        lut = arrays["lut"].astype(np.float32) + np.float32(offset)
        package = _single(
            tmp_path / f"{fits}.mlpackage",
            lambda x, lut=lut: mb.add(
                x=lookup("w", None, **{**arrays, "lut": lut}), y=mb.cast(x=x, dtype="fp32"), name="out"
            ),
        )
        assert np.array_equal(
            package.run({"x": torch.zeros(1)})["out"].numpy(), dense_by_hand({**arrays, "lut": lut})
        )
        if fits:
            assert package.palettized()["w"].lut.dtype == torch.float16
        else:
            with pytest.raises(PackageError, match="float32 values that float16 cannot hold"):
                package.palettized()


def _quantized(data: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Block-wise affine decoding, one value after another."""
    out = np.empty(data.shape, np.float32)
    for position in np.ndindex(*data.shape):
        block = tuple(p * s // d for p, s, d in zip(position, scale.shape, data.shape, strict=True))
        out[position] = (np.float32(data[position]) - np.float32(offset[block])) * np.float32(scale[block])
    return out.astype(scale.dtype)


INT4 = types.nptype_from_builtin(types.int4)


@pytest.mark.parametrize(
    ("bits", "blocks"), [(8, (4, 1)), (8, (2, 3)), (4, (4, 2)), (4, (1, 1))], ids=lambda value: str(value)
)
def test_blockwise_shift_scale(bits: int, blocks: tuple[int, int], tmp_path: Path) -> None:
    low = -(1 << (bits - 1))
    data, offset = (_rng.integers(low, -low, shape).astype(np.int8) for shape in ((8, 12), blocks))
    scale = (_rng.random(blocks) * 0.1).astype(np.float16)
    stored = (data.astype(INT4), offset.astype(INT4)) if bits == 4 else (data, offset)

    def body(x: Any) -> Any:
        weight = mb.constexpr_blockwise_shift_scale(data=stored[0], scale=scale, offset=stored[1], name="w")
        return mb.add(x=weight, y=x, name="out")

    package = _single(tmp_path / "q.mlpackage", body)
    dense = package.run({"x": torch.zeros(1)}, precision="float16")["out"]
    assert np.array_equal(dense.numpy(), _quantized(data, scale, offset))
    assert package.palettized() == {}
    assert np.array_equal(package.dense()["w"].numpy(), _quantized(data, scale, offset))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_affine_dequantize(axis: int, tmp_path: Path) -> None:
    data = _rng.integers(0, 256, (6, 10)).astype(np.uint8)
    length = data.shape[axis]
    scale = (_rng.random(length) * 0.1).astype(np.float16)
    zero = _rng.integers(0, 256, length).astype(np.uint8)

    def body(x: Any) -> Any:
        weight = mb.constexpr_affine_dequantize(quantized_data=data, zero_point=zero, scale=scale, axis=axis)
        return mb.add(x=weight, y=x, name="out")

    package = _single(tmp_path / "a.mlpackage", body, "iOS16")
    around = [1, 1]
    around[axis] = -1
    expected = (data.astype(np.float32) - zero.reshape(around)) * scale.astype(np.float32).reshape(around)
    dense = package.run({"x": torch.zeros(1)}, precision="float16")["out"]
    assert np.array_equal(dense.numpy(), expected.astype(np.float16))


@pytest.mark.parametrize("target", ["iOS16", "iOS18"])
def test_sparse_to_dense(target: str, tmp_path: Path) -> None:
    mask = _rng.integers(0, 2, (5, 7)).astype(bool)
    values = _rng.standard_normal(int(mask.sum())).astype(np.float16)
    expected = np.zeros(mask.shape, np.float16)
    for position, value in zip(itertools.compress(np.ndindex(5, 7), mask.ravel()), values, strict=True):
        expected[position] = value

    def body(x: Any) -> Any:
        if target == "iOS16":
            packed = np.packbits(mask.ravel(), bitorder="little")
            weight = mb.constexpr_sparse_to_dense(
                nonzero_data=values, mask=packed, shape=np.array(mask.shape, np.uint32)
            )
        else:
            flags = mask.astype(types.nptype_from_builtin(types.uint1))
            weight = mb.constexpr_sparse_to_dense(nonzero_data=values, mask=flags)
        return mb.add(x=weight, y=x, name="out")

    package = _single(tmp_path / "sparse.mlpackage", body, target)
    assert np.array_equal(package.run({"x": torch.zeros(1)}, precision="float16")["out"].numpy(), expected)


def test_constexpr_cast(tmp_path: Path) -> None:
    values = _rng.standard_normal((4, 5)).astype(np.float16)

    def body(x: Any) -> Any:
        weight = mb.constexpr_cast(source_val=values, output_dtype="fp32")
        return mb.add(x=weight, y=mb.cast(x=x, dtype="fp32"), name="out")

    package = _single(tmp_path / "cast.mlpackage", body, "iOS16")
    assert np.array_equal(package.run({"x": torch.zeros(1)})["out"].numpy(), values.astype(np.float32))
