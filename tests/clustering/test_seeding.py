from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edkm_export.clustering import hard_assign, optimal_centroids
from edkm_export.clustering.partition import partition
from edkm_export.errors import PaletteError

# The dynamic programme works on prefix sums of values scaled to [-1, 1] and total weight 1, so that a
# partition may be worse than the best by the rounding of these sums: about 1e-15 of the total variance.
ROUNDING = 1e-13


def error_of(weight: torch.Tensor, centroids: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Weighted squared error, float64 [groups]."""
    distance = (weight.double()[:, :, None] - centroids.double()[:, None]).square().amin(2)
    return (distance * importance).sum(1)


def brute_force(values: np.ndarray, importance: np.ndarray, k: int, *, zero: bool) -> float:
    """Least error over all partitions of the sorted values into at most k intervals, one pinned at zero."""
    order = np.argsort(values)
    x, n = values[order], importance[order]
    free, pinned = {}, {}  # error of the interval [a, b) around its mean, and around zero
    for a, b in itertools.combinations_with_replacement(range(len(x) + 1), 2):
        mass = n[a:b].sum()
        mean = (n[a:b] * x[a:b]).sum() / mass if mass else 0.0
        free[a, b] = (n[a:b] * (x[a:b] - mean) ** 2).sum()
        pinned[a, b] = (n[a:b] * x[a:b] ** 2).sum()
    best = np.inf
    for cuts in itertools.combinations_with_replacement(range(len(x) + 1), k - 1):
        intervals = list(itertools.pairwise((0, *cuts, len(x))))
        error = sum(free[interval] for interval in intervals)
        if zero:
            error = min(error - free[interval] + pinned[interval] for interval in intervals)
        best = min(best, error)
    return best


grid = st.integers(-40, 40).map(lambda value: value / 16)  # exact in every dtype, with ties and zeros


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(grid, min_size=1, max_size=9),
    k=st.integers(1, 4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    zero=st.booleans(),
    data=st.data(),
)
def test_no_partition_does_better(values, k, dtype, zero, data):
    size = len(values)
    importance = data.draw(st.lists(st.integers(0, 5), min_size=size, max_size=size))
    shares = torch.tensor([importance], dtype=torch.float64)
    weight = torch.tensor([values], dtype=dtype)
    centroids, error = optimal_centroids(weight, k, importance=shares, zero_preserving=zero)
    effective = shares if shares.sum() > 0 else torch.ones_like(shares)
    best = brute_force(np.array(values), effective[0].numpy(), k, zero=zero)
    scale = float((effective * weight.double().square()).sum()) + 1e-30
    assert abs(float(error) - best) <= ROUNDING * scale
    # The centroids reach that error, are sorted, and hold zero when asked to.
    assert float(error_of(weight, centroids, effective)) <= best + ROUNDING * scale
    assert bool((centroids.diff() >= 0).all())
    assert not zero or bool((centroids == 0).any())


@pytest.mark.parametrize("zero", [False, True])
def test_lloyd_never_does_better(zero):
    torch.manual_seed(0)
    weight = torch.cat([torch.randn(3, 3000), 4 + torch.randn(3, 1000).abs() ** 3], dim=1).half()
    importance = torch.rand(4000).double()
    for k in (2, 7, 16, 64):
        centroids, error = optimal_centroids(weight, k, importance=importance, zero_preserving=zero)
        starts = [centroids] + [weight[:, torch.randperm(4000)[:k]].double() for _ in range(5)]
        for points in starts:
            for _ in range(20):
                if zero:
                    nearest = points.abs().argmin(1, keepdim=True)
                    points = points.scatter(1, nearest, 0.0)
                indices = hard_assign(weight, points).long()
                mass = torch.zeros(3, k).double().scatter_add_(1, indices, importance.expand(3, -1))
                moment = torch.zeros(3, k).double().scatter_add_(1, indices, importance * weight.double())
                means = torch.where(mass > 0, moment / mass.clamp_min(1e-300), points)
                points = torch.where(points == 0, 0.0, means) if zero else means
            # 1e-12 relative: the error is a sum of 4,000 terms.
            assert bool((error <= error_of(weight, points, importance) * (1 + 1e-12)).all())


def test_importance_is_repetition():
    torch.manual_seed(1)
    weight = torch.randn(2, 400).bfloat16()
    times = torch.randint(0, 4, (400,))
    centroids, error = optimal_centroids(weight, 8, importance=times.float())
    repeated, repeated_error = optimal_centroids(weight.repeat_interleave(times, dim=1), 8)
    # 1e-12: the same histogram, summed in another order.
    torch.testing.assert_close(centroids, repeated, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(error, repeated_error, rtol=1e-12, atol=1e-12)
    per_weight, _ = optimal_centroids(weight, 8, importance=times.double().expand(2, -1).clone())
    assert torch.equal(per_weight, centroids)


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_dtype_does_not_matter(low, zero, weighted):
    torch.manual_seed(2)
    weight = (torch.randn(3, 2000) * 0.02).to(low)
    weight[0, :3] = torch.tensor([0.0, -0.0, 0.0])
    importance = torch.randint(0, 9, (3, 2000)).float() if weighted else None  # integers: sums are exact
    expected = optimal_centroids(weight, 16, importance=importance, zero_preserving=zero)
    for dtype in (torch.float32, torch.float64):
        found = optimal_centroids(weight.to(dtype), 16, importance=importance, zero_preserving=zero)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_threads_do_not_matter():
    torch.manual_seed(3)
    weight = torch.randn(37, 500).half()
    importance = torch.rand(500)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = optimal_centroids(weight, 5, importance=importance)
        torch.set_num_threads(4)
        together = optimal_centroids(weight, 5, importance=importance)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone[0], together[0]) and torch.equal(alone[1], together[1])
    single = optimal_centroids(weight[11:12], 5, importance=importance)
    assert torch.equal(single[0][0], alone[0][11])


def test_few_values_are_kept_as_they_are():
    weight = torch.tensor([[3.0, -1.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0]]).half()
    centroids, error = optimal_centroids(weight, 4)
    assert centroids.tolist() == [[-1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0]]
    assert error.tolist() == [0.0, 0.0]
    pinned, _ = optimal_centroids(weight, 4, zero_preserving=True)
    assert pinned.tolist() == [[-1.0, 0.0, 3.0, 3.0], [0.0, 2.0, 2.0, 2.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_short_importance_repeats_along_the_group(dtype: torch.dtype):
    weight, importance = torch.randn(3, 400).to(dtype), torch.rand(50)
    short = optimal_centroids(weight, 8, importance=importance)
    full = optimal_centroids(weight, 8, importance=importance.repeat(8))
    assert torch.equal(short[0], full[0]) and torch.equal(short[1], full[1])


def test_zero_importance_falls_back_to_counts():
    torch.manual_seed(4)
    weight = torch.randn(2, 100).half()
    importance = torch.stack([torch.zeros(100), torch.rand(100)])
    found, _ = optimal_centroids(weight, 4, importance=importance)
    counted, _ = optimal_centroids(weight, 4)
    weighted, _ = optimal_centroids(weight, 4, importance=importance[1])
    assert torch.equal(found[0], counted[0]) and torch.equal(found[1], weighted[1])
    assert not torch.equal(counted[1], weighted[1])


def test_large_problems_are_cut_in_the_middle():
    rng = np.random.default_rng(0)
    x, n = np.sort(rng.standard_normal(3000)), rng.random(3000) + 0.1
    for k in (5, 16, 100):
        # Continuous data: the optimum is unique, so that the edges themselves agree.
        assert np.array_equal(partition(x, n, k, 1), partition(x, n, k, 1 << 30))


def test_offset_and_scale_do_not_spoil_the_optimum():
    torch.manual_seed(5)
    weight = torch.randn(1, 2000).double()
    centroids, error = optimal_centroids(weight, 16)
    # Powers of two scale exactly; 2**20 added rounds the values themselves at 2**-33, about 1e-10.
    scaled, _ = optimal_centroids(weight * 2.0**-300, 16)
    torch.testing.assert_close(scaled * 2.0**300, centroids, rtol=1e-13, atol=1e-13)
    moved, _ = optimal_centroids(weight + 2.0**20, 16)
    torch.testing.assert_close(moved - 2.0**20, centroids, rtol=0, atol=1e-8)
    assert float(error) > 0


def test_extreme_importance_is_no_trap():
    torch.manual_seed(6)
    weight = torch.randn(1, 300).double()
    importance = 10.0 ** (-40 * torch.rand(300).double())  # 40 decades: most are lost against the running sum
    centroids, error = optimal_centroids(weight, 8, importance=importance)
    assert bool(torch.isfinite(centroids).all()) and float(error) >= 0
    whole, _ = optimal_centroids(weight, 1, importance=importance)
    assert float(error) <= float(error_of(weight, whole, importance)) * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_weights_name_their_group(dtype, bad):
    weight = torch.randn(4, 10).to(dtype)
    weight[2, 3] = bad
    with pytest.raises(PaletteError, match="group 2 of 4"):
        optimal_centroids(weight, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.zeros(4)}, r"expected a non-empty float \[groups"),
        ({"weight": torch.zeros(4, 2, dtype=torch.int32)}, "int32"),
        ({"k": 0}, "k is 0"),
        ({"importance": torch.ones(3)}, r"importance is torch.float32 \[3\]"),
        ({"importance": -torch.ones(8)}, "-1.0"),
        ({"importance": torch.full((8,), torch.nan)}, "nan"),
        ({"importance": torch.full((8,), torch.inf)}, "inf"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(PaletteError, match=message):
        optimal_centroids(**{"weight": torch.zeros(2, 8), "k": 2, **arguments})
