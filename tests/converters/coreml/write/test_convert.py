from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from converters.coreml import load_package
from converters.coreml.backend import load_coremltools
from converters.coreml.write.conversion import convert, save_package
from converters.coreml.write.deployment_target import TARGETS, parse_target
from converters.coreml.write.targets import check_target
from edkm_export.errors import BackendMissingError, ConversionError
from edkm_export.palette import PalettizedTensor
from tests.helpers.layers import (
    WEIGHT,
    WIDTHS,
    Convolution,
    Embedding,
    Linear,
    Parallel,
    TiedEmbedding,
    assert_computes,
    assert_same_bits,
    converted,
    example_for,
    form,
    loaded,
)
from tests.helpers.palettes import random_palette

ct = pytest.importorskip("coremltools")


# Palettes of one shape go through one conversion.
FORMS: dict[str, tuple[type[nn.Module], tuple[int, ...], list[dict[str, Any]]]] = {
    "linear per tensor": (Linear, (24, 16), [{"n_bits": n_bits} for n_bits in WIDTHS]),
    "linear in groups of rows": (
        Linear,
        (24, 16),
        [{"n_bits": n_bits, "groups": (3, 1)} for n_bits in WIDTHS],
    ),
    "linear int8": (
        Linear,
        (24, 16),
        [{"n_bits": n_bits, "groups": (3, 1), "int8": True} for n_bits in WIDTHS]
        + [{"n_bits": 4, "int8": True}, {"n_bits": 4, "groups": (4, 2), "int8": True}],
    ),
    "linear in other groups": (
        Linear,
        (24, 16),
        [
            {"n_bits": 4, "groups": (1, 4)},
            {"n_bits": 3, "groups": (4, 2)},
            {"n_bits": 2, "groups": (24, 1)},
            {"n_bits": 1, "groups": (24, 16)},
        ],
    ),
    "vectors": (
        Linear,
        (24, 16),
        [
            {"n_bits": 4, "dim": 2},
            {"n_bits": 6, "dim": 4},
            {"n_bits": 3, "groups": (3, 2), "dim": 2},
            {"n_bits": 8, "dim": 4},
        ],
    ),
    "int8 vectors": (Linear, (24, 16), [{"n_bits": 4, "groups": (3, 1), "dim": 2, "int8": True}]),
    "5x7": (
        Linear,
        (5, 7),
        [
            *({"n_bits": n_bits} for n_bits in WIDTHS),
            {"n_bits": 6, "groups": (5, 1)},
            {"n_bits": 1, "groups": (1, 7)},
            {"n_bits": 3, "groups": (5, 7)},
            {"n_bits": 2, "dim": 5},
        ],
    ),
    "3x5": (Linear, (3, 5), [{"n_bits": 2}, {"n_bits": 3, "groups": (3, 1)}]),
    "embedding": (
        Embedding,
        (40, 12),
        [
            *({"n_bits": n_bits} for n_bits in WIDTHS),
            {"n_bits": 3, "groups": (5, 2)},
            {"n_bits": 4, "groups": (5, 1), "int8": True},
        ],
    ),
    "odd embedding": (Embedding, (331, 27), [{"n_bits": 8}, {"n_bits": 3}]),
    "tied embedding": (
        TiedEmbedding,
        (40, 12),
        [{"n_bits": 8}, {"n_bits": 3, "groups": (4, 1)}, {"n_bits": 4, "groups": (5, 1), "int8": True}],
    ),
    "convolution 1x1": (
        Convolution,
        (12, 8, 1, 1),
        [
            {"n_bits": 4},
            {"n_bits": 3, "groups": (3, 2)},
            {"n_bits": 4, "groups": (3, 1), "int8": True},
            {"n_bits": 4, "dim": 2},
        ],
    ),
    "convolution 3x3": (
        Convolution,
        (6, 4, 3, 3),
        [
            *({"n_bits": n_bits} for n_bits in WIDTHS),
            {"n_bits": 3, "groups": (3, 2)},
            {"n_bits": 2, "groups": (3, 1), "int8": True},
        ],
    ),
    "convolution 3x3 of 5x7 channels": (Convolution, (5, 7, 3, 3), [{"n_bits": 6}, {"n_bits": 3}]),
}


def parallel(
    kind: type[nn.Module], shape: tuple[int, ...], settings: list[dict[str, Any]]
) -> tuple[nn.Module, Tensor, dict[str, PalettizedTensor]]:
    """A module for all settings, an input, and its palettes."""
    names = [f"form.{index}.layer.weight" for index in range(len(settings))]
    palettes = {
        name: random_palette(shape, **form, name=name, seed=seed)
        for seed, (name, form) in enumerate(zip(names, settings, strict=True))
    }
    module = loaded(Parallel(kind(palette) for palette in palettes.values()), palettes)
    return module, example_for(palettes[names[0]], kind), palettes


@pytest.mark.parametrize("form", FORMS)
def test_palettes_come_back_bit_for_bit(form, tmp_path):
    module, example, palettes = parallel(*FORMS[form])
    path = converted(module, example, palettes, tmp_path)
    assert_same_bits(path, palettes)
    assert_computes(path, module, example)


def special(lut: list[float], indices: Tensor) -> tuple[Tensor, Tensor]:
    """LUT and indices"""
    return torch.tensor(lut).half().view(1, 1, -1, 1), indices.byte()


CYCLE = torch.arange(96).view(12, 8)

SPECIAL = {
    "negative zero": special([1.0, -0.0, 0.0, -1.0], CYCLE % 4),
    "largest and smallest": special([65504.0, -65504.0, 2.0**-24, -(2.0**-24)], CYCLE % 4),
    # graph passes remove products with one and sums with zero, and fold constant tensors
    "zeros": special([0.0, 0.0], CYCLE * 0),
    "ones": special([1.0, 1.0], CYCLE * 0),
    "constant": special([0.5, 1.0, 2.0, 3.0], CYCLE * 0 + 2),
    "last entry only": special([0.5, 1.0, 2.0, 3.0], CYCLE * 0 + 3),
    "unsorted and repeated": special([3.0, -1.0, 3.0, 0.5], CYCLE % 4),
}


def test_special_values_survive(tmp_path):
    palettes = {}
    for index, (lut, indices) in enumerate(SPECIAL.values()):
        name = f"form.{index}.layer.weight"
        palettes[name] = PalettizedTensor.from_indices(name, lut, indices)
    module = loaded(Parallel(Linear(palette) for palette in palettes.values()), palettes)
    assert_same_bits(converted(module, torch.randn(3, 8), palettes, tmp_path), palettes)


# Several weights


class Chain(nn.Module):
    """Linear layers one after the other, with dense ones, biases and a scale among them."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(size, size)
        self.second = nn.Linear(size, size, bias=False)
        self.dense = nn.Linear(size, size)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, size))

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.second(torch.tanh(self.first(x)))) * self.scale


def test_two_equal_weights_both_survive(tmp_path):
    palettes = {
        name: random_palette((16, 16), 3, (4, 1), name=name) for name in ("first.weight", "second.weight")
    }
    assert palettes["first.weight"].same_bits(palettes["second.weight"])
    module = loaded(Chain(), palettes)
    example = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    path = converted(module, example, palettes, tmp_path)
    assert_same_bits(path, palettes)
    assert_computes(path, module, example)


def test_two_equal_weights_of_one_input_both_survive(tmp_path):
    """As keys and values of a layer that was pruned to zeros; a pass takes the two products for one."""
    palettes = {
        name: random_palette((8, 16), 3, name=name) for name in ("form.0.layer.weight", "form.1.layer.weight")
    }
    module = loaded(Parallel(Linear(palette) for palette in palettes.values()), palettes)
    assert_same_bits(converted(module, torch.randn(2, 16), palettes, tmp_path), palettes)


def test_equal_weights_with_different_palettes(tmp_path):
    """The same dense values, but other LUTs: each keeps the one that training learned."""
    first = random_palette((16, 16), 3, name="first.weight")
    order = torch.tensor([7, 6, 5, 4, 3, 2, 1, 0])
    second = PalettizedTensor.from_indices(
        "second.weight", first.lut[:, :, order], (7 - first.unpack_indices().int()).byte()
    )
    assert torch.equal(first.decode(), second.decode()) and not first.same_bits(second)
    palettes = {"first.weight": first, "second.weight": second}
    assert_same_bits(converted(loaded(Chain(), palettes), torch.randn(2, 16), palettes, tmp_path), palettes)


def test_other_parameters_stay_as_they_are(tmp_path):
    palettes = {"second.weight": random_palette((16, 16), 4, name="second.weight")}
    module = loaded(Chain(), palettes)
    package = load_package(converted(module, torch.randn(2, 16), palettes, tmp_path))
    dense = package.dense()
    for name, parameter in module.named_parameters():
        if name not in palettes:
            assert torch.equal(dense[name].flatten(), parameter.half().flatten()), name
    assert_same_bits(package.path, palettes)


class Prefixed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.decoder = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x)


def test_names_are_those_of_the_checkpoint_not_of_the_module(tmp_path):
    palettes = {"first.weight": random_palette((16, 16), 4, name="first.weight")}
    module = Prefixed(loaded(Chain(), palettes)).eval()
    path = converted(module, torch.randn(2, 16), palettes, tmp_path, prefix="decoder.")
    assert_same_bits(path, palettes)
    assert "dense.weight" in load_package(path).dense()


class Named(nn.Module):
    """Two linear layers under names that identifiers of a program cannot tell apart, or hold."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        for name in (first, second):
            parent: nn.Module = self
            *path, last = name.removesuffix(".weight").split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, nn.Linear(16, 16, bias=False))
        self.order = tuple(name.removesuffix(".weight") for name in (first, second))

    def forward(self, x: Tensor) -> Tensor:
        first, second = map(self.get_submodule, self.order)
        return second(torch.tanh(first(x)))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("layers.1.weight", "layers.11.weight"),
        ("0.weight", "1.weight"),  # as in nn.Sequential
        ("up.proj.weight", "up_proj.weight"),
        ("x.weight", "main.weight"),  # names of the input and of the function
        ("größe.weight", "名.weight"),
    ],
)
def test_names_that_a_program_cannot_hold(first, second, tmp_path):
    palettes = {
        name: random_palette((16, 16), 3, name=name, seed=seed) for seed, name in enumerate((first, second))
    }
    module = loaded(Named(first, second), palettes)
    assert_same_bits(converted(module, torch.randn(2, 16), palettes, tmp_path), palettes)


def test_metadata_is_kept(tmp_path):
    palettes = {WEIGHT: random_palette((16, 16), 4, name=WEIGHT)}
    module = loaded(Linear(palettes[WEIGHT]), palettes)
    path = converted(module, torch.randn(2, 16), palettes, tmp_path, metadata={"mine": "yes"})
    assert load_package(path).metadata["mine"] == "yes"


def test_conversion_without_palettes(tmp_path):
    module = Chain().eval()
    path = converted(module, torch.randn(2, 16), {}, tmp_path)
    assert load_package(path).palettized() == {}
    assert torch.equal(load_package(path).dense()["first.weight"], module.first.weight.half())


def test_passes_of_coremltools_are_left_as_they_were(tmp_path):
    """Our pass needs a substitution: it must not stay in the pipeline of other conversions."""
    palettes = {WEIGHT: random_palette((16, 16), 4, name=WEIGHT)}
    module = loaded(Linear(palettes[WEIGHT]), palettes)
    before = list(ct.PassPipeline.DEFAULT.passes)
    converted(module, torch.randn(2, 16), palettes, tmp_path)
    assert list(ct.PassPipeline.DEFAULT.passes) == before
    traced = torch.jit.trace(module, torch.randn(2, 16))
    ct.convert(traced, inputs=[ct.TensorType("x", (2, 16))], skip_model_load=True)


# Targets


@pytest.mark.parametrize("target", ["iOS16", "iOS17"])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [(Linear, (24, 16)), (Linear, (5, 7)), (Embedding, (40, 12)), (Convolution, (5, 7, 3, 3))],
)
def test_older_targets_hold_one_float16_lut(target, kind, shape, tmp_path):
    module, example, palettes = parallel(kind, shape, [{"n_bits": n_bits} for n_bits in (1, 2, 4, 6, 8)])
    path = converted(module, example, palettes, tmp_path, target=target)
    assert load_package(path).functions["main"].opset == {"iOS16": "CoreML6", "iOS17": "CoreML7"}[target]
    assert_same_bits(path, palettes)
    assert_computes(path, module, example)


@pytest.mark.parametrize("target", ["iOS16", "iOS17"])
@pytest.mark.parametrize(
    ("palette", "what", "remedy"),
    [
        (form(3), "3-bit indices", "palettize with --bits 2 or 4"),
        (form(groups=(4, 1)), "grouped LUTs", "palettize with --group-size 0"),
        (form(groups=(1, 4)), "grouped LUTs", "palettize with --group-size 0"),
        (form(dim=2), "vector LUTs", "use scalar LUTs"),
        (form(int8=True), "int8 LUTs", "palettize with a float16 LUT"),
    ],
    ids=["3 bits", "rows", "columns", "vectors", "int8"],
)
def test_older_targets_refuse_what_they_cannot_hold(target, palette, what, remedy):
    message = f"model.pt needs iOS18: {WEIGHT} has {what}, which {target} cannot hold. Use --target iOS18, or {remedy}."
    module = loaded(Linear(palette), {WEIGHT: palette})
    with pytest.raises(ConversionError) as caught:
        convert(module, (), {WEIGHT: palette}, inputs=[], target=target, source="model.pt")
    assert str(caught.value) == message
    check_target({WEIGHT: palette}, "iOS18", "model.pt")


def test_several_weights_are_counted():
    palettes = {f"{index}.weight": form(3) for index in range(3)}
    with pytest.raises(ConversionError, match="model.pt needs iOS18: 3 weights have 3-bit indices"):
        check_target(palettes, "iOS17", "model.pt")


@pytest.mark.parametrize("target", ["iOS15", "macOS12", "18", "iOS", "Android 15", ""])
def test_unknown_target(target):
    with pytest.raises(
        ConversionError, match=f"target {target!r} is unknown; use one of iOS16, iOS17, iOS18"
    ):
        parse_target(target)
    assert TARGETS == ("iOS16", "iOS17", "iOS18")


def test_newer_targets_are_told_what_serves_them():
    with pytest.raises(ConversionError, match="A package for iOS18 also runs on later systems"):
        parse_target("iOS26")


@pytest.mark.parametrize(
    ("written", "target"),
    [
        ("iOS16", "iOS16"), ("ios17", "iOS17"), ("IOS18", "iOS18"), ("iOS 18", "iOS18"), ("ios-18", "iOS18"),
        ("iOS_18.4", "iOS18"), (" ios18.0.1 ", "iOS18"), ("macOS13", "iOS16"), ("macos 14.2", "iOS17"),
        ("macOS15", "iOS18"), ("watchOS11", "iOS18"),
    ],
)  # fmt: skip
def test_usual_spellings_of_a_target(written, target):
    """Systems of one year hold the same programs: coremltools' own names for them are one value."""
    assert parse_target(written) == target
    plain = re.sub(r"[\s_-]|\.\d", "", written).lower()
    values = {name.lower(): value for name, value in ct.target.__members__.items()}
    assert values[plain] is ct.target[target]


def test_convert_takes_any_spelling():
    """The library, as the command line: here a target that cannot hold the palette is refused by its own name."""
    with pytest.raises(ConversionError, match="which iOS17 cannot hold"):
        convert(torch.nn.Linear(1, 1), (), {WEIGHT: form(3)}, target="macOS 14")


# Saving, and the back end


def test_disk_that_is_full_leaves_no_package(tmp_path):
    class Model:
        def save(self, path: str) -> None:
            Path(path).mkdir()
            (Path(path) / "half").write_bytes(b"half")
            raise RuntimeError("write failed")

    with pytest.raises(
        OSError, match=r"model.mlpackage: writing failed, is the disk full\? \(write failed\)"
    ):
        save_package(Model(), tmp_path / "model.mlpackage")
    assert list(tmp_path.iterdir()) == []


def test_missing_coremltools_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(BackendMissingError, match=r"pip install 'edkm-export\[coreml\]'"):
        load_coremltools()
