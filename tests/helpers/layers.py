"""Models of one palettized layer, their conversion, and what has to come of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from converters.coreml import load_package
from converters.coreml.write.conversion import convert, save_package
from edkm_export.palette import PalettizedTensor
from tests.helpers.palettes import numpy_decode, random_palette

ct = pytest.importorskip("coremltools")

WEIGHT = "layer.weight"


class Linear(nn.Module):
    def __init__(self, palette: PalettizedTensor) -> None:
        super().__init__()
        out, columns = palette.shape
        self.layer = nn.Linear(columns, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Convolution(nn.Module):
    def __init__(self, palette: PalettizedTensor) -> None:
        super().__init__()
        out, channels, height, width = palette.shape
        self.layer = nn.Conv2d(channels, out, (height, width), padding=(height // 2, width // 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Embedding(nn.Module):
    def __init__(self, palette: PalettizedTensor) -> None:
        super().__init__()
        self.layer = nn.Embedding(*palette.shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class TiedEmbedding(Embedding):
    """Embedding and output head share the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.layer(x), self.layer.weight)


class Parallel(nn.Module):
    """Modules that read the same input, so that one conversion takes many forms."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.form = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(module(x) for module in self.form)


def loaded(module: nn.Module, palettes: dict[str, PalettizedTensor]) -> nn.Module:
    """The module with the decoded weights in float32, the others rounded to what float16 holds."""
    for parameter in module.parameters():
        parameter.data = parameter.data.half().float()
    for name, palette in palettes.items():
        # an independent decoder, so that convert compares two opinions
        module.get_parameter(name).data = torch.from_numpy(numpy_decode(palette)).float()
    return module.eval().requires_grad_(False)


def example_for(palette: PalettizedTensor, kind: type[nn.Module] = Linear) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if issubclass(kind, Embedding):
        return torch.randint(palette.shape[0], (1, 6), generator=generator, dtype=torch.int32)
    if kind is Convolution:
        return torch.randn(1, palette.shape[1], 5, 4, generator=generator)
    return torch.randn(3, palette.shape[1], generator=generator)


def converted(
    module: nn.Module, example: Tensor, palettes: dict[str, PalettizedTensor], folder: Path, **options: Any
) -> Path:
    dtype = np.int32 if example.dtype == torch.int32 else np.float16
    model = convert(
        module,
        (example,),
        palettes,
        inputs=[ct.TensorType("x", tuple(example.shape), dtype=dtype)],
        **options,
    )
    save_package(model, folder / "model.mlpackage")
    return folder / "model.mlpackage"


def assert_same_bits(path: Path, palettes: dict[str, PalettizedTensor]) -> None:
    found = load_package(path).palettized()
    assert found.keys() == palettes.keys()
    assert [name for name, palette in palettes.items() if not palette.same_bits(found[name])] == []


def assert_computes(path: Path, module: nn.Module, example: Tensor) -> None:
    expected = module(example)
    found = tuple(load_package(path).run({"x": example}).values())
    # both in float32, from weights that are equal: only the order of up to 36 products of size one differs
    torch.testing.assert_close(
        found, expected if isinstance(expected, tuple) else (expected,), rtol=1e-5, atol=1e-5
    )


WIDTHS = (1, 2, 3, 4, 6, 8)


def form(n_bits: int = 4, **settings: Any) -> PalettizedTensor:
    return random_palette((16, 16), n_bits, name=WEIGHT, **settings)
