"""Against loops over numbers that eliminate one weight after the other, and numpy's least squares."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from edkm_export.clustering.compensation import (
    chosen,
    compensated_indices,
    descended_indices,
    inverse_factor,
    output_error,
    refitted_centroids,
)


def problem(rows: int, n: int, k: int, groups: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, ascending centroids and H of correlated inputs with outlier channels, all float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, n, generator=generator, dtype=torch.float64)
    centroids = torch.randn(groups, k, generator=generator, dtype=torch.float64).sort(1).values
    inputs = torch.randn(3 * n, n, generator=generator, dtype=torch.float64)
    inputs = inputs @ (torch.eye(n, dtype=torch.float64) + 0.3 * torch.randn(n, n, generator=generator))
    inputs[:, :: max(1, n // 3)] *= 20
    return weight, centroids, inputs.T @ inputs / len(inputs)


def nearest(entries: np.ndarray, value: float) -> int:
    return int(np.argmin((entries - value) ** 2))


def naive_gptq(weight: Tensor, centroids: Tensor, hessian: Tensor) -> np.ndarray:
    """Optimal Brain Surgeon, one weight at a time: the inverse is updated by elimination, nothing is factorized."""
    values, entries = weight.numpy().copy(), centroids.numpy()
    found = np.zeros(values.shape, np.uint8)
    for row in range(len(values)):
        inverse = np.linalg.inv(hessian.numpy())
        lut = entries[row * len(entries) // len(values)]
        for j in range(values.shape[1]):
            found[row, j] = nearest(lut, values[row, j])
            error = (values[row, j] - lut[found[row, j]]) / inverse[j, j]
            values[row] -= error * inverse[j]
            inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
            inverse[j], inverse[:, j] = 0.0, 0.0
    return found


SHAPES = [(4, 5, 2, 1), (6, 33, 8, 3), (3, 130, 4, 1), (32, 7, 16, 2), (1, 1, 2, 1), (5, 257, 3, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_columns_are_assigned_as_in_the_naive_loop(shape):
    weight, centroids, hessian = problem(*shape)
    found = compensated_indices(weight, centroids, inverse_factor(hessian))
    assert np.array_equal(found.numpy(), naive_gptq(weight, centroids, hessian))


@pytest.mark.parametrize("shape", SHAPES)
def test_inverse_factor(shape):
    _, _, hessian = problem(*shape)
    factor = inverse_factor(hessian)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ hessian, torch.eye(len(hessian), dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES)
def test_indices_move_as_in_the_naive_loop(shape):
    weight, centroids, hessian = problem(*shape)
    rows, n = weight.shape
    start = torch.zeros(rows, n, dtype=torch.uint8)
    found, error = descended_indices(weight, centroids, hessian, start, sweeps=2)
    assert error == pytest.approx(output_error(weight - chosen(centroids, found), hessian), rel=1e-9)
    h, entries = hessian.numpy(), centroids.numpy()
    for row in range(rows):
        lut = entries[row * len(entries) // rows]
        indices = np.zeros(n, np.uint8)
        for _ in range(2):
            for j in range(n):
                errors = []
                for k in range(len(lut)):
                    indices[j] = k
                    change = weight[row].numpy() - lut[indices]
                    errors.append(change @ h @ change)
                indices[j] = int(np.argmin(errors))
        assert np.array_equal(found[row].numpy(), indices)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sweep_never_makes_the_error_larger(shape):
    weight, centroids, hessian = problem(*shape)
    indices = compensated_indices(weight, centroids, inverse_factor(hessian))
    before = output_error(weight - chosen(centroids, indices), hessian)
    _, after = descended_indices(weight, centroids, hessian, indices)
    assert after <= before * (1 + 1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_refit_is_least_squares(shape):
    weight, centroids, hessian = problem(*shape)
    (rows, _), (groups, k) = weight.shape, centroids.shape
    indices = compensated_indices(weight, centroids, inverse_factor(hessian))
    found = refitted_centroids(weight, centroids, hessian, indices, steps=3 * k)
    root = np.linalg.cholesky(hessian.numpy()).T
    for group, block in enumerate(torch.arange(rows).chunk(groups)):
        one_hot = np.concatenate([root @ np.eye(k)[indices[row].numpy()] for row in block])
        target = np.concatenate([root @ weight[row].numpy() for row in block])
        solved, *_ = np.linalg.lstsq(one_hot, target, rcond=None)
        used = np.isin(np.arange(k), indices[block].numpy())
        np.testing.assert_allclose(found[group].numpy()[used], solved[used], rtol=1e-6, atol=1e-8)
        assert np.array_equal(found[group].numpy()[~used], centroids[group].numpy()[~used])


def test_each_step_of_the_refit_makes_the_error_smaller():
    weight, centroids, hessian = problem(16, 60, 8, 1)
    indices = compensated_indices(weight, centroids, inverse_factor(hessian))
    errors = [
        output_error(
            weight - chosen(refitted_centroids(weight, centroids, hessian, indices, steps=steps), indices),
            hessian,
        )
        for steps in range(9)
    ]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors[:5]))
    assert errors[-1] <= errors[4]


def test_float32_and_threads_change_nothing():
    weight, centroids, hessian = (each.float() for each in problem(64, 200, 8, 4))
    factor = inverse_factor(hessian)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = compensated_indices(weight, centroids, factor)
        torch.set_num_threads(1)
        assert torch.equal(two, compensated_indices(weight, centroids, factor))
    finally:
        torch.set_num_threads(threads)
