from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edkm_export.decoder.norms import LayerNorm, RMSNorm


def reference_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """float64"""
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


def make_norm(size: int, eps: float = 1e-5) -> RMSNorm:
    norm = RMSNorm(size, eps)
    norm.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    return norm.half()


# Five roundings to float16 of 2**-11 each lie between input and output, two of them under a root.
HALF_TOLERANCE = 4 * 2**-11


@pytest.mark.parametrize("size", [32, 576, 4096])
@pytest.mark.parametrize("deviation", [0.01, 1, 300, 10000])
@torch.no_grad()
def test_norm_in_float16(size, deviation):
    norm = make_norm(size)
    generator = torch.Generator().manual_seed(size)
    x = (torch.randn(1, 64, size, generator=generator) * deviation).clamp(-65504, 65504).half()
    if deviation >= 300:
        assert x.square().isinf().any()  # what a plain float16 norm would take the mean of
    found = norm(x)
    expected = reference_norm(x, norm.weight, 1e-5)
    assert found.dtype == torch.float16 and found.isfinite().all()
    # relative to the largest value of a row, 2**-24 being the grid of the smallest numbers
    error = (found.double() - expected).abs().amax(-1)
    assert bool((error <= HALF_TOLERANCE * expected.abs().amax(-1) + 2**-24).all())


@torch.no_grad()
def test_norm_with_one_enormous_channel():
    norm = make_norm(64)
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 60000
    found, expected = norm(x.half()), reference_norm(x.half(), norm.weight, 1e-5)
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, 3].double(), expected[:, 3], rtol=HALF_TOLERANCE, atol=0)
    # The others come out around 1e-4, where the grid of float16 is 2**-24.
    torch.testing.assert_close(found.double(), expected, rtol=HALF_TOLERANCE, atol=8 * 2**-23)


@pytest.mark.parametrize("deviation", [1, 0.1, 0.03])
@torch.no_grad()
def test_channels_far_below_an_enormous_one(deviation):
    """They are given back their size by the weight, as in trained Gemmas."""
    norm = RMSNorm(64, 1e-5)
    norm.weight.fill_(2000)
    norm.weight[3] = 0
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * deviation
    x[:, 3] = 60000
    found, expected = norm.half()(x.half()), reference_norm(x.half(), norm.weight, 1e-5)
    # 0.8% at most as measured; 6% for a norm that multiplies what it has scaled to one at most
    assert (found - expected).abs().max() < 0.02 * expected.square().mean().sqrt()


@torch.no_grad()
def test_norm_of_zeros_is_zero():
    assert torch.equal(make_norm(32)(torch.zeros(4, 32).half()), torch.zeros(4, 32).half())


@pytest.mark.parametrize("deviation", [1e-3, 1e-4, 1e-5, 1e-6])
@torch.no_grad()
def test_norm_of_tiny_inputs(deviation):
    """Below the root of epsilon the norm is linear: x / sqrt(eps)."""
    norm = make_norm(64)
    x = (torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) * deviation).half()
    found, expected = norm(x), reference_norm(x, norm.weight, 1e-5)
    assert found.isfinite().all() and bool((expected != 0).any())
    error = (found.double() - expected).abs().amax(-1)
    # x / (largest + 2**-10) is rounded to float16, to 2**-11 of it or half of 2**-24, and then grows by up to
    # 2**-10 / sqrt(eps) = 0.3
    assert bool((error <= HALF_TOLERANCE * expected.abs().amax(-1) + 2**-24).all())


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 1e-3])
@torch.no_grad()
def test_norm_in_float32_is_that_of_transformers(eps):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm, other = RMSNorm(48, eps), LlamaRMSNorm(48, eps)
    for deviation in (1e-4, 1.0, 1e4):
        x = torch.randn(8, 48, generator=torch.Generator().manual_seed(0)) * deviation
        torch.testing.assert_close(norm(x), other(x), rtol=1e-5, atol=0)  # float32, a few roundings apart


def test_epsilon_is_no_parameter():
    assert list(RMSNorm(4, 1e-5).state_dict()) == ["weight"]


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
@torch.no_grad()
def test_norm_with_offset_is_that_of_gemma(eps):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    norm, other = RMSNorm(48, eps, offset=True), Gemma3RMSNorm(48, eps)
    generator = torch.Generator().manual_seed(0)
    other.weight.uniform_(-1, 3, generator=generator)
    norm.load_state_dict(other.state_dict())
    x = torch.randn(8, 48, generator=generator)
    torch.testing.assert_close(norm(x), other(x), rtol=1e-5, atol=1e-6)  # float32, a few roundings apart


@torch.no_grad()
def test_scaled_residuals_are_read_and_written_exactly():
    """A power of two in front of the norm, and epsilon with its square, give the same bits; so does one behind it."""
    norm, scale = RMSNorm(48, 1e-3), 2.0**-6
    reading, writing = RMSNorm(48, 1e-3 * scale**2), RMSNorm(48, 1e-3, scale=scale)
    x = torch.randn(8, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(writing(x), norm(x) * scale)
    # The floor under the largest magnitude is not scaled with the input, which costs a rounding.
    torch.testing.assert_close(reading(x * scale), norm(x), rtol=1e-6, atol=0)


@pytest.mark.parametrize("deviation", [1e-3, 1.0, 1e3])
@torch.no_grad()
def test_layer_norm_is_that_of_torch(deviation):
    norm, other = LayerNorm(48, 1e-5), nn.LayerNorm(48, 1e-5)
    generator = torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        parameter.uniform_(-1, 1, generator=generator)
    norm.load_state_dict(other.state_dict())
    x = (torch.randn(8, 48, generator=generator) + 0.5) * deviation
    torch.testing.assert_close(norm(x), other(x), rtol=1e-5, atol=2e-6)  # float32, a few roundings apart


@torch.no_grad()
def test_layer_norm_in_float16_beyond_squares():
    norm = LayerNorm(768, 1e-5).half()
    x = torch.randn(16, 768, generator=torch.Generator().manual_seed(0)) * 3
    x[:, 7] = 3000  # as in the first tokens of GPT-2
    found = norm(x.half())
    expected = nn.functional.layer_norm(x.half().double(), (768,), eps=1e-5)
    assert (x.half() ** 2).isinf().any()
    # as for the root mean square norm, with one more subtraction; the grid of wide numbers up to 64 is 2**-5
    torch.testing.assert_close(found.double(), expected, rtol=HALF_TOLERANCE, atol=2e-3)
