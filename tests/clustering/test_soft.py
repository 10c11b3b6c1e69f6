from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edkm_export.clustering import optimal_centroids, soft_cluster
from edkm_export.errors import PaletteError

# Two exact evaluations of the same formulas in float64, relative to the largest entry. Measured 7e-13 with
# 256 centroids and five iterations, each of which multiplies the rounding errors of the one before.
EXACT = 1e-10


def run(method, weight, centroids, temperature, iterations, grad_soft, grad_last):
    """(soft weight, centroids, both gradients) of a loss that sees both results."""
    weight, centroids = weight.clone().requires_grad_(), centroids.clone().requires_grad_()
    soft, last = soft_cluster(
        weight, centroids, temperature=temperature, iterations=iterations, method=method
    )
    assert soft.dtype == weight.dtype and soft.shape == weight.shape and last.shape == centroids.shape
    torch.autograd.backward([soft, last], [grad_soft.to(soft.dtype), grad_last.to(last.dtype)])
    return soft.detach(), last.detach(), weight.grad, centroids.grad


def largest_difference(found, expected) -> float:
    """Largest difference relative to the largest entry, over the four results."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def problem(groups, m, k, dim, dtype=torch.float64, seed=0):
    """Weights with repetitions, centroids near some of them, a temperature for each group, two gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tail = (dim,) if dim else ()
    weight = (normal(groups, m, *tail) * 0.02).to(dtype)
    weight[:, : m // 4] = weight[:, m // 4 : m // 4 * 2]
    order = torch.randperm(m, generator=generator)
    centroids = weight[:, order[:k]].double() + 1e-3 * normal(groups, k, *tail)
    softness = 8e-5 * max(dim, 1) / k  # neighbours share weights, distant centroids do not
    temperature = softness * (0.5 + torch.rand(groups, generator=generator, dtype=torch.float64))
    return weight, centroids, temperature, normal(*weight.shape), 10 * normal(*centroids.shape)


# Vectors do not repeat, so there is no histogram of them.
@pytest.mark.parametrize(
    ("method", "dim"),
    [("histogram", 0), *((method, dim) for method in ("streaming", "marshaled") for dim in (0, 1, 3))],
)
@pytest.mark.parametrize(("k", "iterations", "groups"), [(2, 1, 1), (8, 5, 3), (16, 3, 2), (256, 2, 1)])
def test_exactly_dense_autograd(method, dim, k, iterations, groups):
    weight, centroids, temperature, *grads = problem(groups, 600, k, dim)
    expected = run("dense", weight, centroids, temperature, iterations, *grads)
    found = run(method, weight, centroids, temperature, iterations, *grads)
    assert largest_difference(found, expected) < EXACT


@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from(["histogram", "streaming"]),
    groups=st.integers(1, 3),
    m=st.integers(8, 40),
    k=st.integers(1, 8),
    iterations=st.integers(1, 4),
    dim=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_exactly_dense_autograd_for_any_shape(method, groups, m, k, iterations, dim, seed):
    dim = 0 if method == "histogram" else dim
    weight, centroids, temperature, *grads = problem(groups, m, k, dim, seed=seed)
    expected = run("dense", weight, centroids, temperature, iterations, *grads)
    found = run(method, weight, centroids, temperature, iterations, *grads)
    # With few weights a centroid can hold almost no mass, which costs digits in both evaluations; and where every
    # weight sits on its centroid, the gradient of the centroids is what rounding leaves of terms of size one.
    for value, dense in zip(found, expected, strict=True):
        assert float((value - dense).abs().max()) < 1e-8 * float(dense.abs().max()) + 1e-13


def test_blocks_and_chunks_do_not_matter(monkeypatch):
    from edkm_export.clustering import histogram, patterns, recurrence, streaming

    low, centroids, temperature, *grads = problem(5, 700, 8, 0, torch.bfloat16)
    high = problem(5, 700, 8, 2)
    expected_low = run("histogram", low, centroids, temperature, 3, *grads)
    expected_high = run("streaming", *high[:3], 3, *high[3:])
    monkeypatch.setattr(recurrence, "_HOST_BLOCK_ENTRIES", 500)
    monkeypatch.setattr(streaming, "_CHUNK", 2800)
    monkeypatch.setattr(histogram, "_BINS", 1 << 17)
    monkeypatch.setattr(patterns, "_BLOCK", 64)
    monkeypatch.setattr(patterns, "_LEAST_BLOCK", 16)
    assert largest_difference(run("histogram", low, centroids, temperature, 3, *grads), expected_low) < EXACT
    assert largest_difference(run("streaming", *high[:3], 3, *high[3:]), expected_high) < EXACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["histogram", "streaming"])
def test_16_bit_weights_with_float64_tables(dtype, method):
    weight, centroids, temperature, grad_soft, grad_last = problem(2, 3000, 8, 0, dtype)
    grad_soft = grad_soft.to(dtype)
    expected = run("dense", weight.double(), centroids, temperature, 3, grad_soft, grad_last)
    soft, last, grad_weight, grad_centroids = run(
        method, weight, centroids, temperature, 3, grad_soft, grad_last
    )
    assert largest_difference((last, grad_centroids), (expected[1], expected[3])) < EXACT
    # What is returned in 16 bits is the exact value rounded once: half a unit in the last place.
    limits = torch.finfo(dtype)
    for found, value in ((soft, expected[0]), (grad_weight, expected[2])):
        error = (found.double() - value).abs()
        assert bool((error <= value.abs() * limits.eps * 0.5001 + limits.tiny * limits.eps).all())


def test_equal_weights_keep_their_own_gradient():
    # Through the table, weight i receives G_i d_u. With the mean of G over equal weights instead, this fails.
    weight = torch.tensor([[0.0, 0.0, 1.0, 1.0, 2.0]], dtype=torch.float16)
    grads = torch.tensor([[3.0, -3.0, 1.0, -1.0, 0.0]]), torch.zeros(1, 2)
    centroids = torch.tensor([[0.2, 1.7]])
    *_, found, _ = run("histogram", weight, centroids, 1.0, 1, *grads)
    *_, expected, _ = run("dense", weight.double(), centroids, 1.0, 1, *grads)
    assert float((found[0, 0] - found[0, 1]).abs()) > 0.5
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=1e-5)  # float16 has 11 bits


@pytest.mark.parametrize("method", ["histogram", "streaming"])
def test_float32_tables_are_close(method):
    weight, centroids, temperature, *grads = problem(2, 5000, 8, 0, torch.float32)
    expected = run("dense", weight.double(), centroids, temperature, 5, *grads)
    found = run(method, weight, centroids.float(), temperature, 5, *grads)
    # Rounding of float32 (6e-8) in exponents of up to about 100, five times over: measured below 1e-5.
    assert found[1].dtype == torch.float32
    assert largest_difference(found, expected) < 1e-4


@pytest.mark.parametrize("method", ["dense", "histogram", "streaming"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_centroid_out_of_reach_stays(method, dtype):
    weight = torch.linspace(-1, 1, 64, dtype=torch.float64).to(dtype)[None]
    centroids = torch.tensor([[-0.5, 0.5, 1e6]], dtype=torch.promote_types(dtype, torch.float32))
    grad_last = torch.tensor([[1.0, 2.0, 5.0]])
    soft, last, grad_weight, grad_centroids = run(
        method, weight, centroids, 0.1, 3, torch.ones(1, 64), grad_last
    )
    assert float(last[0, 2]) == 1e6 and float(grad_centroids[0, 2]) == 5.0
    for result in (soft, last, grad_weight, grad_centroids):
        assert bool(torch.isfinite(result).all())


@pytest.mark.parametrize(("method", "dim"), [("histogram", 0), ("streaming", 0), ("streaming", 2)])
def test_fixed_point(method, dim):
    tail = (dim,) if dim else ()
    generator = torch.Generator().manual_seed(0)
    middles = 3 * torch.randn(2, 4, *tail, generator=generator, dtype=torch.float64)
    spread = torch.randn(2, 50, 4, *tail, generator=generator, dtype=torch.float64)
    weight = (middles[:, None] + spread * 0.4).reshape(2, 200, *tail)
    grads = torch.randn(weight.shape, generator=generator), torch.randn(middles.shape, generator=generator)
    expected = run("dense", weight, middles, 0.3, 400, *grads)
    found = run(method, weight, middles, 0.3, "converge", *grads)
    # Dense autograd through 400 iterations forgets the start: its own gradient there tells how far it is.
    assert float(expected[3].abs().max()) < 1e-12
    assert bool((found[3] == 0).all())
    # The iteration stops at 32 ulps of movement, 1e-14; the distance left is that over 1 minus the rate.
    assert largest_difference(found[:3], expected[:3]) < EXACT


def test_saved_for_backward_is_a_reference_and_the_centroids():
    weight = (torch.randn(1, 1 << 20) * 0.02).bfloat16().requires_grad_()
    centroids = optimal_centroids(weight.detach(), 8)[0].float().requires_grad_()
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        soft, _ = soft_cluster(weight, centroids, temperature=2e-5, iterations=1)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    assert storages.pop(weight.untyped_storage().data_ptr()) == 2 << 20
    assert 0 < sum(storages.values()) <= 1024  # c^0, c^1, the mass and tau: 8 float32 each, 1 for tau
    soft.sum().backward()
    assert weight.grad is not None


_PEAK = """
import torch
from edkm_export.clustering import soft_cluster

def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

def step(size):
    weight = (torch.randn(1, size) * 0.02).bfloat16().requires_grad_()
    centroids, upstream = torch.linspace(-0.05, 0.05, 8)[None], torch.ones_like(weight)
    open("/proc/self/clear_refs", "w").write("5")
    before = kib("VmRSS:")
    soft, _ = soft_cluster(weight, centroids, temperature=2e-5, iterations=1)
    soft.backward(upstream)
    return kib("VmHWM:") - before

step(1 << 16)
print(step(1 << 24))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_two_results():
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    # Soft weight and gradient of 16.8M bfloat16 weights are 32 MiB each. Tables and blocks, 0.75 MiB a thread
    # and 2 MiB in all, need room besides; a single int32 index would need 64 MiB.
    assert 60 * 1024 < int(done.stdout) < 80 * 1024


def test_strided_input_and_expanded_gradient():
    weight, centroids, temperature, *_ = problem(3, 500, 4, 0, torch.bfloat16)
    for method in ("histogram", "streaming"):
        plain = weight.clone().requires_grad_()
        soft_cluster(plain, centroids, temperature=temperature, iterations=2, method=method)[
            0
        ].sum().backward()
        turned = weight.t().contiguous().requires_grad_()
        soft_cluster(turned.t(), centroids, temperature=temperature, iterations=2, method=method)[
            0
        ].sum().backward()
        assert torch.equal(turned.grad.t(), plain.grad)


def test_auto_takes_the_histogram_for_large_16_bit_groups(monkeypatch):
    from edkm_export.clustering import soft

    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(soft.Histogram, "apply", refuse)
    for weight in (torch.randn(1, 8192), torch.randn(1, 4095).half(), torch.randn(1, 8192, 1).half()):
        soft_cluster(weight, torch.randn(1, 2, *weight.shape[2:]), temperature=1.0, iterations=1)
    with pytest.raises(AssertionError):
        soft_cluster(torch.randn(1, 4096).half(), torch.randn(1, 2), temperature=1.0, iterations=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.zeros(4)}, "do not fit"),
        ({"centroids": torch.zeros(3, 2)}, "do not fit"),
        ({"weight": torch.zeros(2, 4, 2), "centroids": torch.zeros(2, 2, 3)}, "do not fit"),
        ({"weight": torch.zeros(2, 0)}, "empty"),
        ({"weight": torch.zeros(2, 4, dtype=torch.int8)}, "int8"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": torch.tensor([1.0, torch.nan])}, "temperature is nan"),
        ({"temperature": torch.ones(3)}, r"temperature has shape \[3\]"),
        ({"iterations": 0}, "iterations is 0"),
        ({"iterations": "often"}, "iterations is 'often'"),
        ({"iterations": "converge", "method": "dense"}, "cannot iterate"),
        ({"method": "flash"}, "'flash'"),
        (
            {"weight": torch.zeros(2, 4, 1), "centroids": torch.zeros(2, 2, 1), "method": "histogram"},
            "scalars",
        ),
    ],
)
def test_bad_input_is_refused(arguments, message):
    good = {"weight": torch.zeros(2, 4), "centroids": torch.zeros(2, 2), "temperature": 1.0, "iterations": 1}
    with pytest.raises(PaletteError, match=message):
        soft_cluster(**{**good, **arguments})


def test_import_is_light():
    code = (
        "import sys, edkm_export.clustering; print([name for name in "
        "('triton', 'coremltools', 'transformers', 'onnx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
