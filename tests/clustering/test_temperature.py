from __future__ import annotations

import pytest
import torch

from edkm_export.clustering import optimal_centroids, scale_free_temperature, soft_cluster
from edkm_export.errors import PaletteError


def test_error_per_weight():
    torch.manual_seed(0)
    weight, importance = torch.randn(3, 200).half(), torch.rand(200)
    _, error = optimal_centroids(weight, 4, importance=importance)
    found = scale_free_temperature(weight, 4, alpha=1.5, importance=importance)
    torch.testing.assert_close(found, 1.5 * error / importance.double().sum())
    given = scale_free_temperature(weight, 4, alpha=1.5, importance=importance, error=error)
    assert torch.equal(given, found)


@pytest.mark.parametrize("power", [-8, 5])
def test_scale_of_the_weights_does_not_matter(power):
    torch.manual_seed(1)
    weight = torch.randn(2, 500)
    scale = 2.0**power  # exact, so that the results agree bit for bit
    centroids, _ = optimal_centroids(weight, 8)
    results = []
    for factor in (1.0, scale):
        tau = scale_free_temperature(weight * factor, 8)
        soft, _ = soft_cluster(weight * factor, centroids.float() * factor, temperature=tau, iterations=3)
        results.append(soft / factor)
    assert torch.equal(results[0], results[1])


def test_groups_without_error_get_a_positive_temperature():
    weight = torch.tensor([[1.0, 1.0, -2.0, -2.0], [0.0, 0.0, 0.0, 0.0]])
    tau = scale_free_temperature(weight, 2)
    assert bool((tau > 0).all())
    centroids, _ = optimal_centroids(weight, 2)
    soft, _ = soft_cluster(weight, centroids.float(), temperature=tau, iterations=2)
    assert torch.equal(soft, weight)


def test_zero_importance_counts_weights():
    weight = torch.randn(1, 50)
    assert torch.equal(
        scale_free_temperature(weight, 2, importance=torch.zeros(50)), scale_free_temperature(weight, 2)
    )


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("inf"), float("nan")])
def test_alpha_is_positive(alpha):
    with pytest.raises(PaletteError, match="alpha"):
        scale_free_temperature(torch.randn(1, 5), 2, alpha=alpha)


def test_error_has_an_entry_a_group():
    with pytest.raises(PaletteError, match=r"error has shape \[2\]"):
        scale_free_temperature(torch.randn(1, 5), 2, error=torch.ones(2))
