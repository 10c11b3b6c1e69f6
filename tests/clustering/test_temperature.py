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


def dense_gradient(weight, centroids, temperature, iterations, upstream):
    """Of the soft weight, by float64 autograd over the equations written out; `temperature` float64 [groups]."""
    leaf = weight.double().requires_grad_()
    for _ in range(iterations):
        distance = (leaf[:, :, None] - centroids[:, None]).square()
        attention = (-distance / temperature[:, None, None]).softmax(2)
        centroids = (attention * leaf[..., None]).sum(1) / attention.sum(1)
    return torch.autograd.grad((attention * centroids[:, None]).sum(2), leaf, upstream)[0]


@pytest.mark.parametrize("method", ["dense", "histogram", "streaming", "marshaled"])
@pytest.mark.parametrize("kind", ["number", "groups", "numbers", "scale-free", "known error"])
def test_float64_weights_see_a_temperature_in_float64(kind, method):
    """2e-4 rounded to float32 is off by 2e-8, and so would the gradient be. Measured: 2e-14."""
    generator = torch.Generator().manual_seed(3)
    weight = 0.02 * torch.randn(2, 600, generator=generator, dtype=torch.float64)
    upstream = torch.randn(2, 600, generator=generator, dtype=torch.float64)
    centroids, error = optimal_centroids(weight, 8)
    alpha = 2e2 / 3  # not a float32 number either
    best = (weight[..., None] - centroids[:, None]).square().amin(2).mean(1)
    temperature, exact = {
        "number": (2e-4, torch.tensor([2e-4, 2e-4], dtype=torch.float64)),
        "groups": (torch.tensor([2e-4, 3e-5], dtype=torch.float64),) * 2,
        "numbers": ([2e-4, 3e-5], torch.tensor([2e-4, 3e-5], dtype=torch.float64)),
        "scale-free": (scale_free_temperature(weight, 8, alpha=alpha), alpha * best),
        "known error": (scale_free_temperature(weight, 8, alpha=alpha, error=error), alpha * best),
    }[kind]
    leaf = weight.clone().requires_grad_()
    soft, _ = soft_cluster(leaf, centroids, temperature=temperature, iterations=3, method=method)
    soft.backward(upstream)
    expected = dense_gradient(weight, centroids, exact, 3, upstream)
    assert float((leaf.grad - expected).abs().max()) < 1e-12 * float(expected.abs().max())
