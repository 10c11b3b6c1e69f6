"""Conversions that would not be exact are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from converters.coreml.write.conversion import convert
from edkm_export.errors import ConversionError
from edkm_export.palette import PalettizedTensor
from tests.helpers.layers import (
    WEIGHT,
    Convolution,
    Linear,
    example_for,
    loaded,
)
from tests.helpers.palettes import random_palette

ct = pytest.importorskip("coremltools")


def test_palette_whose_name_is_not_in_the_module():
    palettes = {WEIGHT: random_palette((16, 16), 4, name=WEIGHT), "layer.wait": random_palette((16, 16), 4)}
    module = loaded(Linear(palettes[WEIGHT]), {WEIGHT: palettes[WEIGHT]})
    with pytest.raises(
        ConversionError, match=r"model.pt: 1 palettized weights were not found .*: layer.wait\."
    ):
        convert(
            module, (torch.randn(2, 16),), palettes, inputs=[ct.TensorType("x", (2, 16))], source="model.pt"
        )


class Unused(Linear):
    def __init__(self, palette: PalettizedTensor) -> None:
        super().__init__(palette)
        self.other = nn.Linear(16, 16, bias=False)


def test_weight_that_the_program_does_not_use():
    palettes = {name: random_palette((16, 16), 4, name=name) for name in (WEIGHT, "other.weight")}
    module = loaded(Unused(palettes[WEIGHT]), palettes)
    with pytest.raises(ConversionError, match="would ship dense: other.weight"):
        convert(module, (torch.randn(2, 16),), palettes, inputs=[ct.TensorType("x", (2, 16))])


@pytest.mark.parametrize("change", [2**-6, -1.0, 1e4])
def test_weight_that_was_changed_by_hand(change):
    """The constant in the program is not what the palette decodes to."""
    palettes = {WEIGHT: random_palette((16, 16), 4, name=WEIGHT)}
    module = loaded(Linear(palettes[WEIGHT]), palettes)
    module.layer.weight.data[3, 5] += change
    with pytest.raises(ConversionError, match=f"{WEIGHT}: another conversion pass changed this weight"):
        convert(module, (torch.randn(2, 16),), palettes, inputs=[ct.TensorType("x", (2, 16))])


class Folded(Linear):
    """The weight is used through a product that a pass folds into it."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.layer.weight * 3.0)


def test_weight_that_a_pass_folds_into_another():
    palettes = {WEIGHT: random_palette((16, 16), 4, name=WEIGHT)}
    module = loaded(Folded(palettes[WEIGHT]), palettes)
    with pytest.raises(ConversionError, match=WEIGHT):
        convert(module, (torch.randn(2, 16),), palettes, inputs=[ct.TensorType("x", (2, 16))])


def test_groups_that_split_a_kernel():
    palettes = {WEIGHT: random_palette((6, 4, 3, 3), 3, (1, 12), name=WEIGHT)}
    module = loaded(Convolution(palettes[WEIGHT]), palettes)
    example = example_for(palettes[WEIGHT], type(module))
    with pytest.raises(
        ConversionError, match="12 input groups split a convolution kernel; use whole channels"
    ):
        convert(module, (example,), palettes, inputs=[ct.TensorType("x", tuple(example.shape))])


class Unconvertible(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(self.layer(x)).real


def test_model_that_coremltools_cannot_convert():
    palettes = {WEIGHT: random_palette((16, 16), 4, name=WEIGHT)}
    module = loaded(Unconvertible(palettes[WEIGHT]), palettes)
    with pytest.raises(ConversionError, match="model.pt: coremltools cannot convert this model"):
        convert(
            module, (torch.randn(16, 16),), palettes, inputs=[ct.TensorType("x", (16, 16))], source="model.pt"
        )
