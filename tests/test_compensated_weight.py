from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from edkm_export import compensated_weight
from edkm_export.compensated_weight import palettize_compensated, palettize_vocabulary
from edkm_export.errors import PaletteError
from edkm_export.lut_dtypes import LutDtype
from edkm_export.palettization import palettize_weight
from edkm_export.recipe import Rule


def layer(rows: int, columns: int, tokens: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight with a few huge entries, and correlated inputs with an outlier channel; float16, float32."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.1
    weight.view(-1)[:: max(2, weight.numel() // 3)] *= 30
    mixing = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing
    inputs[:, columns // 2] *= 30
    return weight.half(), inputs


def error(weight: Tensor, decoded: Tensor, inputs: Tensor) -> float:
    """Squared error of the outputs, from the outputs themselves."""
    return float((inputs.double() @ (weight.double() - decoded.double()).t()).square().sum())


def both(weight: Tensor, inputs: Tensor, rule: Rule) -> tuple[float, float]:
    """The error with compensation, and that of weighted k-means."""
    made = palettize_compensated("w", weight, rule, inputs.t() @ inputs / len(inputs))
    assert made.shape == tuple(weight.shape) and made.lut_dtype == rule.lut_dtype and made.n_bits == rule.bits
    plain = palettize_weight("w", weight, rule, importance=inputs.square().mean(0))
    return error(weight, made.decode(), inputs), error(weight, plain.decode(), inputs)


FORMS: list[tuple[int, int, LutDtype]] = [
    (1, 4, "float16"),
    (2, 0, "float16"),
    (3, 16, "float16"),
    (4, 1, "float16"),
    (6, 0, "float16"),
    (2, 8, "int8"),
    (4, 16, "int8"),
    (1, 16, "int4"),
    (3, 16, "int4"),
]


@pytest.mark.parametrize(("bits", "group_size", "lut_dtype"), FORMS)
def test_the_output_errs_less_than_with_weighted_k_means(bits, group_size, lut_dtype):
    weight, inputs = layer(32, 80, 400)
    made, plain = both(weight, inputs, Rule(bits=bits, group_size=group_size, lut_dtype=lut_dtype))
    assert made < 0.8 * plain  # measured 0.05 to 0.6


@pytest.mark.parametrize("tokens", [1, 7, 79])
def test_fewer_tokens_than_columns(tokens):
    weight, inputs = layer(32, 80, tokens)
    made, plain = both(weight, inputs, Rule(bits=3, group_size=16))
    assert made < plain


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 1), (5, 131), (27, 37), (16, 300)])
def test_odd_sizes(shape):
    weight, inputs = layer(*shape, 64)
    made, plain = both(weight, inputs, Rule(bits=2, group_size=0))
    assert made <= plain + 1e-6 * error(weight, torch.zeros_like(weight), inputs)


def test_dead_inputs_are_ordinary_columns():
    """An input that is always zero costs nothing: its weights are at their nearest entries, the others gain."""
    weight, inputs = layer(32, 40, 200)
    inputs[:, ::3] = 0
    made, plain = both(weight, inputs, Rule(bits=3, group_size=8))
    assert made < plain
    decoded = palettize_compensated("w", weight, Rule(bits=3, group_size=8), inputs.t() @ inputs).decode()
    assert bool(torch.isfinite(decoded).all())


def test_no_inputs_at_all_is_plain_k_means():
    weight, _ = layer(32, 40, 10)
    made = palettize_compensated("w", weight, Rule(bits=3, group_size=8), torch.zeros(40, 40))
    plain = palettize_weight("w", weight, Rule(bits=3, group_size=8))
    errors = [float((each.decode().double() - weight).square().sum()) for each in (made, plain)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)  # centroids are rounded to float16 twice


@pytest.mark.parametrize("value", [0.0, -2.5])
def test_equal_weights_are_exact(value):
    _, inputs = layer(8, 12, 30)
    weight = torch.full((8, 12), value).half()
    made = palettize_compensated("w", weight, Rule(bits=2, group_size=4), inputs.t() @ inputs)
    assert torch.equal(made.decode(), weight)


def test_as_many_values_as_entries_are_exact():
    values = torch.arange(-8, 8).half() / 4
    weight = values[torch.randint(16, (8, 50), generator=torch.Generator().manual_seed(0))]
    _, inputs = layer(8, 50, 100)
    made = palettize_compensated("w", weight, Rule(bits=4, group_size=0), inputs.t() @ inputs)
    assert torch.equal(made.decode(), weight)


def test_a_factor_of_the_hessian_does_not_matter():
    weight, inputs = layer(16, 40, 100)
    hessian = inputs.t() @ inputs
    made = [
        palettize_compensated("w", weight, Rule(bits=3), hessian * factor) for factor in (1, 2**-10, 2**10)
    ]
    assert made[0].same_bits(made[1]) and made[0].same_bits(made[2])


def test_the_weight_is_left_as_it_is():
    weight, inputs = layer(16, 40, 100)
    before, hessian = weight.clone(), inputs.t() @ inputs
    kept = hessian.clone()
    first = palettize_compensated("w", weight, Rule(bits=3), hessian)
    assert torch.equal(weight, before) and torch.equal(hessian, kept)
    assert palettize_compensated("w", weight, Rule(bits=3), hessian).same_bits(first)


@pytest.mark.parametrize(
    ("weight", "hessian", "message"),
    [
        (
            torch.ones(4, 3, 2),
            torch.eye(3),
            "w: is torch.float32 [4, 3, 2], expected floating point [out, in]",
        ),
        (torch.ones(4, 3), torch.eye(4), "Hessian of its inputs is [4, 4], expected finite [3, 3]"),
        (torch.ones(4, 3), torch.full((3, 3), float("nan")), "expected finite [3, 3]"),
        (torch.ones(5, 3), torch.eye(3), "group_size 16 does not divide its 5 output rows"),
        (torch.full((16, 3), float("inf")), torch.eye(3), "holds NaN or infinity"),
    ],
)
def test_what_does_not_fit_is_refused(weight, hessian, message):
    with pytest.raises(PaletteError, match=re.escape(message)):
        palettize_compensated("w", weight, Rule(bits=3), hessian)


def test_one_token_says_nothing_of_how_channels_go_together():
    """Told that it is one, errors are those of weighted k-means on other tokens; otherwise they are much larger."""
    weight, inputs = layer(32, 80, 400)
    one = inputs[:1].t() @ inputs[:1]
    rule = Rule(bits=3, group_size=16)
    plain = palettize_weight("w", weight, rule, importance=inputs[0].square())
    told = palettize_compensated("w", weight, rule, one, samples=1)
    bound = error(weight, plain.decode(), inputs[1:])
    assert error(weight, told.decode(), inputs[1:]) < 1.2 * bound


def test_ranges_of_a_vocabulary_are_palettized_apart(monkeypatch):
    """Each range of whole groups gives what it gives alone; without groups there is one range."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(48, 12, generator=generator), torch.randn(64, 12, generator=generator)
    hessian = inputs.T @ inputs / 64
    monkeypatch.setattr(compensated_weight, "_RANGE", 16 * 12)
    for lut_dtype, group_size in (("float16", 8), ("int8", 16), ("float16", 0)):
        rule, counted = Rule(bits=3, group_size=group_size, lut_dtype=lut_dtype), []
        made = palettize_vocabulary("w", weight, rule, hessian, advance=counted.append)
        height = 16 if group_size else 48
        assert counted == [height * 12] * (48 // height)
        for start in range(0, 48, height):
            alone = palettize_compensated("w", weight[start : start + height], rule, hessian)
            assert torch.equal(made.decode()[start : start + height], alone.decode())
