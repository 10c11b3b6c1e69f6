"""Scales and rounding of int4 LUTs, against loops over numbers and on weights; int8 is in test_palettize.py."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edkm_export.clustering import optimal_centroids
from edkm_export.lut_grid import LutDtype, check_bits, round_to_grid, scale_of
from edkm_export.palettization import palettize_weight
from edkm_export.recipe import Rule
from edkm_export.training.palettized.grid import Grid

# Of four significant bits, as float16 holds them, and little enough for 8 times as much.
SCALES = sorted(n * 2.0**e for n in range(8, 16) for e in range(-24, 10))


def random_weights(groups: int, m: int, seed: int = 0) -> Tensor:
    """Student's t of 5 degrees, float16 [groups, m]: with some weights far out, as models have them."""
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.standard_t(5, (groups, m)) * 0.02).half()


def brute_force(centroids: list[float]) -> float:
    """The scale by its definition, one number after another."""
    c = sorted(centroids)
    k, largest = len(c), max(abs(value) for value in c)
    middles = [(a + b) / 2 for a, b in itertools.pairwise(c)]
    width = [c[1] - c[0], *(b - a for a, b in itertools.pairwise(middles)), c[-1] - c[-2]]
    width = [max(width[0], width[1] / 2), *width[1:-1], max(width[-1], width[-2] / 2)]
    width = [max(each, largest / 64) if each > 0 else largest for each in width]
    first = next(number for number, scale in enumerate(SCALES) if scale >= largest / 7)
    costs = {}
    for scale in reversed(SCALES[first - 15 : first + 1]):
        rounded = [min(7, max(-8, int(np.rint(value / scale)))) * scale for value in c]
        costs[scale] = sum(width[j] ** -2 * (c[j] - rounded[j]) ** 2 for j in range(k))
    return min(costs, key=costs.__getitem__)


def check_exact(lut: Tensor, scale: Tensor, values: Tensor) -> None:
    """Entries on the grid, scales of four bits, products that no dtype rounds."""
    assert lut.dtype == torch.int8 and int(lut.min()) >= -8 and int(lut.max()) <= 7
    assert scale.dtype == values.dtype == torch.float16 and bool((scale > 0).all())
    mantissa, _ = torch.frexp(scale.double())
    assert torch.equal((mantissa * 16).round(), mantissa * 16)
    exact = lut.double() * scale.double()[:, None]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal((lut.to(dtype) * scale.to(dtype)[:, None]).double(), exact)
    assert torch.equal(values.double(), exact) and torch.equal(values.bfloat16().double(), exact)


@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize("kind", ["random", "clustered", "unordered"])
def test_the_scale_is_the_best_of_sixteen(k: int, kind: str) -> None:
    if kind == "clustered":
        centroids, _ = optimal_centroids(random_weights(64, 512), k)
    else:
        generator = torch.Generator().manual_seed(k)
        centroids = torch.randn(200, k, generator=generator, dtype=torch.float64)
        centroids *= torch.logspace(-3, 2, 200, dtype=torch.float64)[:, None]
        centroids = centroids.sort(1).values if kind == "random" else centroids
    expected = [brute_force(row) for row in centroids.tolist()]
    assert scale_of(centroids, "int4").tolist() == expected
    first = [
        math.log2(scale / float(row.abs().amax() / 7)) for scale, row in zip(expected, centroids, strict=True)
    ]
    assert min(first) < -0.2  # the largest entry is cut off in some group
    rounded = round_to_grid(centroids, "int4")
    assert rounded.scale is not None
    check_exact(rounded.lut, rounded.scale, rounded.values)
    nearest = (centroids / rounded.scale.double()[:, None]).numpy()
    assert np.array_equal(np.clip(np.rint(nearest), -8, 7), rounded.lut.numpy())


def test_groups_do_not_depend_on_each_other_nor_on_the_precision() -> None:
    centroids, _ = optimal_centroids(random_weights(16, 256), 8)
    together = scale_of(centroids, "int4")
    assert torch.equal(together, torch.cat([scale_of(row[None], "int4") for row in centroids]))
    assert torch.equal(together, scale_of(centroids.flip(1), "int4"))
    # times a power of two, which no rounding notices
    assert torch.equal(together * 4, scale_of(centroids * 4, "int4"))


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_training_and_one_shot_round_alike(bits: int) -> None:
    weight = random_weights(12, 96)
    shipped = palettize_weight("w", weight, Rule(bits=bits, group_size=4, lut_dtype="int4"))
    centroids, _ = optimal_centroids(weight.view(3, -1), 1 << bits)
    for in_bfloat16 in (False, True):
        trained = Grid("int4", in_bfloat16).round(centroids)
        assert trained.scale is not None and shipped.lut_scale is not None
        assert torch.equal(trained.lut, shipped.lut[:, 0, :, 0])
        assert torch.equal(trained.scale, shipped.lut_scale[:, 0])
        assert torch.equal(trained.values, shipped.lut_values()[:, 0, :, 0])
    check_exact(trained.lut, trained.scale, trained.values)


def test_most_of_what_free_entries_gain_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured at 3 bits: 1.21 times the error of free entries; 1.76 with the scale that reaches the largest."""
    weight = random_weights(256, 576)

    def error(lut_dtype: LutDtype) -> float:
        tensor = palettize_weight("w", weight, Rule(bits=3, group_size=16, lut_dtype=lut_dtype))
        return float((tensor.decode().float() - weight.float()).square().sum())

    free, found = error("float16"), error("int4")
    monkeypatch.setattr("edkm_export.lut_grid._CANDIDATES", 1)
    reaching = error("int4")
    assert free < found < 1.3 * free and found < 0.8 * reaching


@pytest.mark.parametrize(
    ("centroids", "limit"),
    [
        ([0.0] * 8, 0.0),
        ([-2.5] * 8, 0.01),
        ([-0.0, 0.0], 0.0),
        ([0.3, 0.3], 0.01),
        ([-1.0, 1.0], 0.02),
        ([0.1, 0.1, 0.1, 0.5], 0.07),  # three of equal value stand for as many weights as one
        ([0.1, 0.1, 0.5, 0.5], 0.07),
        ([-0.34, -0.34 + 1e-9, -0.1, 0.0, 0.1, 0.3, 0.6, 1.0], 0.2),  # two that pass each other, at an end
        ([-1.0, -0.6, -0.1, 0.0, 1e-9, 2e-9, 0.5, 1.0], 0.1),  # three
        ([1.0, 1.0 + 1e-300, 0.0, 5e-324], 0.05),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_centroids_that_meet(centroids: list[float], limit: float, dtype: Any) -> None:
    """None is far off, as it would be if another had all of the weight; a share of the largest."""
    rows = torch.tensor([centroids], dtype=dtype)
    rounded = round_to_grid(rows, "int4")
    assert rounded.scale is not None
    check_exact(rounded.lut, rounded.scale, rounded.values)
    largest = float(rows.abs().max())
    assert float((rounded.values.double() - rows.double()).abs().max()) <= limit * largest
    if largest == 0:
        assert rounded.scale.tolist() == [1.0]


@pytest.mark.parametrize("magnitude", [1e-30, 6e-8, 3e-7, 1e-5, 1e-4, 6e4, 65504.0, 1e6])
def test_the_ends_of_float16(magnitude: float) -> None:
    rows = torch.tensor([[-1.0, -0.5, -0.2, 0.0, 0.1, 0.3, 0.5, 1.0]], dtype=torch.float64) * magnitude
    rounded = round_to_grid(rows, "int4")
    assert rounded.scale is not None
    check_exact(rounded.lut, rounded.scale, rounded.values)
    assert math.isfinite(float(rounded.scale.double() * 8)) and bool(torch.isfinite(rounded.scale * 8).all())
    if magnitude < 5e4:  # at the upper end the last scale cuts off
        # half a step, which is at least the smallest float16
        limit = 0.5 * max(magnitude / 7 * 1.125, 2.0**-24)
        assert float((rounded.values.double() - rows).abs()[:, 1:-1].max()) <= limit


def test_int4_is_for_at_most_3_bits() -> None:
    for bits in (1, 2, 3):
        check_bits("int4", bits)
    with pytest.raises(
        ValueError, match="16 levels, so that with indices of 4 bits there is nothing left to choose"
    ):
        check_bits("int4", 4)
    check_bits("int8", 8)
