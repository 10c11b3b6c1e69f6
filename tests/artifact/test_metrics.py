from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edkm_export.artifact.metrics import divergence, perplexity, snr_db, token_losses


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def numpy_kl(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    p, q = log_softmax(reference), log_softmax(candidate)
    return (np.exp(p) * (p - q)).sum(-1)


def logits_pair(positions: int, seed: int = 0, noise: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(positions, 50, generator=generator) * 3
    return reference, reference + torch.randn(positions, 50, generator=generator) * noise


# float64 on both sides
EXACT = {"rel": 1e-9, "abs": 1e-12}


@pytest.mark.parametrize("positions", [1, 2, 3, 10, 999, 1000, 1001, 2001])
def test_divergence_is_that_of_numpy(positions):
    reference, candidate = logits_pair(positions)
    found = divergence([(reference, candidate)])
    kl = numpy_kl(reference.numpy(), candidate.numpy())
    agreement = (reference.numpy().argmax(-1) == candidate.numpy().argmax(-1)).mean()
    assert found.tokens == positions
    assert found.kl_mean == pytest.approx(kl.mean(), **EXACT)
    assert found.kl_median == pytest.approx(np.quantile(kl, 0.5, method="higher"), **EXACT)
    assert found.kl_p999 == pytest.approx(np.quantile(kl, 0.999, method="inverted_cdf"), **EXACT)
    assert found.kl_max == pytest.approx(kl.max(), **EXACT)
    assert found.top1_agreement == pytest.approx(agreement, **EXACT)
    if positions >= 999:
        assert 0.5 < found.top1_agreement < 1 and found.kl_median < found.kl_mean < found.kl_p999


def test_divergence_over_windows_is_that_of_all_positions():
    pairs = [logits_pair(positions, seed=positions) for positions in (5, 1, 17)]
    whole = tuple(torch.cat(parts) for parts in zip(*pairs, strict=True))
    assert divergence(pairs) == divergence([whole])
    assert divergence(iter(pairs)) == divergence(pairs)


def test_divergence_of_a_model_from_itself_is_zero():
    reference, _ = logits_pair(20)
    found = divergence([(reference, reference + 7)])  # a constant changes no distribution
    # float32 logits of size 10, in which the constant is rounded to 1e-6
    assert found.kl_max < 1e-10 and found.kl_mean >= 0 and found.top1_agreement == 1


def test_divergence_has_a_direction():
    reference, candidate = logits_pair(50)
    assert divergence([(reference, candidate)]).kl_mean != divergence([(candidate, reference)]).kl_mean


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_candidate_that_is_not_finite_is_infinitely_far_and_disagrees(value):
    reference, _ = logits_pair(4)
    candidate = reference.clone()
    candidate[1, 7] = value
    found = divergence([(reference, candidate)])
    assert found.kl_mean == found.kl_max == found.kl_p999 == math.inf
    assert found.kl_median < 1e-12  # the other three are equal
    assert found.top1_agreement == 0.75


def test_candidate_of_nothing_but_nan():
    reference, _ = logits_pair(3)
    found = divergence([(reference, torch.full_like(reference, math.nan))])
    assert found.kl_median == math.inf and found.top1_agreement == 0


def test_logits_far_apart_do_not_overflow():
    reference, candidate = torch.zeros(1, 3), torch.tensor([[0.0, -60000.0, -60000.0]])
    # two of three equally likely tokens get a log probability of -60,000
    assert divergence([(reference, candidate)]).kl_mean == pytest.approx(40000 - math.log(3))


def test_token_losses_are_those_of_numpy():
    logits, _ = logits_pair(12)
    tokens = torch.randint(50, (12,), generator=torch.Generator().manual_seed(1))
    expected = -log_softmax(logits.numpy())[np.arange(11), tokens.numpy()[1:]]
    found = token_losses(logits, tokens)
    assert found.dtype == torch.float64 and found.shape == (11,)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)  # float32


def test_perplexity_is_that_of_numpy():
    losses = [torch.rand(size, generator=torch.Generator().manual_seed(size)) * 5 for size in (3, 8, 1)]
    flat = torch.cat(losses).double().numpy()
    found = perplexity(losses)
    assert found.tokens == 12
    assert found.value == pytest.approx(np.exp(flat.mean()), **EXACT)
    expected = np.exp(flat.mean()) * flat.std(ddof=1) / np.sqrt(12)
    assert found.standard_error == pytest.approx(expected, **EXACT)


def test_perplexity_of_a_guess_is_the_size_of_the_vocabulary():
    tokens = torch.randint(50, (20,), generator=torch.Generator().manual_seed(0))
    found = perplexity([token_losses(torch.zeros(20, 50), tokens)])
    assert found.value == pytest.approx(50, rel=1e-6) and found.standard_error == pytest.approx(0, abs=1e-4)


def test_perplexity_beyond_floating_point_is_infinite():
    assert perplexity([torch.full((4,), 1e4)]).value == math.inf


@settings(max_examples=50, deadline=None)
@given(scale=st.floats(1e-3, 1e3), noise=st.floats(1e-3, 1e1), seed=st.integers(0, 100))
def test_snr_is_that_of_numpy(scale, noise, seed):
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(7, 9, generator=generator) * scale
    candidate = reference + torch.randn(7, 9, generator=generator) * scale * noise
    signal, error = reference.double().numpy(), (reference.double() - candidate.double()).numpy()
    expected = 10 * np.log10((signal**2).sum() / (error**2).sum())
    assert snr_db(reference, candidate) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_snr_at_its_ends():
    ones = torch.ones(3)
    assert snr_db(ones, ones) == math.inf
    assert snr_db(ones, torch.zeros(3)) == 0
    assert snr_db(torch.zeros(3), ones) == -math.inf
    assert snr_db(ones.half(), ones.half() * 1.5) == pytest.approx(10 * math.log10(4))


@pytest.mark.parametrize(("gap", "ties"), [(0.005, 1), (0.02, 0)])
def test_near_ties_are_disagreements_between_equally_likely_tokens(gap: float, ties: int):
    reference = torch.tensor([[1.0, 1.0 - gap, -3.0], [2.0, 0.0, 0.0]])
    candidate = torch.tensor([[1.0, 1.001, -3.0], [2.0, 0.0, 0.0]])
    found = divergence([(reference, candidate)])
    assert (found.top1_agreement, found.near_ties) == (0.5, ties)
    assert found.settled_agreement == 0.5 + ties / 2


def test_an_output_that_is_not_finite_is_no_tie():
    reference = torch.tensor([[1.0, 1.0]])
    found = divergence([(reference, torch.tensor([[math.nan, 1.0]]))])
    assert (found.top1_agreement, found.near_ties) == (0.0, 0)
