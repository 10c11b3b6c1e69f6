"""Statistics of channels against plain formulas, and where these overflow float16."""

from __future__ import annotations

import pytest
import torch

from edkm_export.decoder.magnitudes import SameMagnitude, TopGates


def vectors(scale: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(5, 512, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_a_vector_gets_the_magnitude_of_another(scale):
    x, like = vectors(scale), vectors(7.0, seed=1)
    plain = x * like.square().mean(-1, keepdim=True).sqrt()
    plain = plain / x.square().mean(-1, keepdim=True).clamp(min=1e-5).sqrt()
    torch.testing.assert_close(SameMagnitude(1e-5)(x, like), plain, rtol=1e-5, atol=1e-6)
    found = SameMagnitude(1e-5).half()(x.half(), like.half()).float()
    # float16 has 11 bits, and fewer below 6e-5
    torch.testing.assert_close(found, plain, rtol=4e-3, atol=3e-3 if scale > 1e-3 else 5e-3)


def test_a_vector_of_zeros_stays_one():
    same = SameMagnitude(1e-5)
    for module, dtype in ((same, torch.float32), (same.half(), torch.float16)):
        found = module(torch.zeros(2, 512, dtype=dtype), vectors(7.0)[:2].to(dtype))
        assert torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize("zeros", [0.3, 0.95])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_top_gates(zeros, scale):
    x = vectors(scale)
    normal = torch.distributions.normal.Normal(0, 1).icdf(torch.tensor(zeros))
    plain = torch.relu(x - (x.mean(-1, keepdim=True) + x.std(-1, keepdim=True, unbiased=False) * normal))
    torch.testing.assert_close(TopGates(zeros)(x), plain, rtol=1e-4, atol=1e-5 * scale)
    assert abs(float((plain == 0).float().mean()) - zeros) < 0.03
    found = TopGates(zeros).half()(x.half()).float()
    torch.testing.assert_close(
        found, plain, rtol=2e-3, atol=4e-3 * scale
    )  # differences of numbers up to four
