"""The gated delta rule in chunks against a loop over the tokens, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edkm_export.decoder.config import LinearAttention
from edkm_export.decoder.context import Context
from edkm_export.decoder.delta_rule import Triangle, chunked_delta_rule, delta_step
from edkm_export.decoder.linear_attention import Rule

HEADS, KEY, VALUE = 3, 5, 4


def by_the_book(
    queries: Tensor, keys: Tensor, values: Tensor, decay: Tensor, strength: Tensor, matrices: Tensor
) -> tuple[Tensor, Tensor]:
    """The three equations of the paper, for each head and token by itself."""
    matrices = matrices.double().clone()
    outputs = torch.empty(*queries.shape[:3], values.shape[-1], dtype=torch.float64)
    for batch in range(queries.shape[0]):
        for head in range(queries.shape[1]):
            state = matrices[batch, head]
            for token in range(queries.shape[2]):
                q, k, v = (each[batch, head, token].double() for each in (queries, keys, values))
                g, b = (float(each[batch, head, token, 0]) for each in (decay, strength))
                state = state * torch.tensor(g, dtype=torch.float64).exp()
                state = state + torch.outer(k, b * (v - state.T @ k))
                outputs[batch, head, token] = state.T @ q
            matrices[batch, head] = state
    return outputs, matrices


def operands(tokens: int, *, batch: int = 1, seed: int = 0) -> list[Tensor]:
    """Queries and keys of length one, values, decays from a half to nearly one, strengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, HEADS, tokens, *shape, generator=generator)

    queries, keys = (torch.nn.functional.normalize(draw(KEY), dim=-1) for _ in range(2))
    return [queries, keys, draw(VALUE), -draw(1).exp() * 0.1, draw(1).sigmoid()]


def some_matrices(batch: int = 1) -> Tensor:
    return torch.randn(batch, HEADS, KEY, VALUE, generator=torch.Generator().manual_seed(9))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 40), size=st.integers(1, 20), batch=st.integers(1, 2), seed=st.integers(0, 99))
def test_chunks_are_the_loop(tokens, size, batch, seed):
    given_operands, before = operands(tokens, batch=batch, seed=seed), some_matrices(batch)
    expected = by_the_book(*given_operands, before)
    for triangle in (Triangle.of(size), Triangle.open(tokens, 64)):
        found = chunked_delta_rule(*given_operands, before, triangle)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5)  # float32 against float64


def test_a_token_at_a_time_goes_on():
    tokens, before = operands(12), some_matrices()
    expected, after = by_the_book(*tokens, before)
    for place in range(12):
        output, before = delta_step(*(each[:, :, place : place + 1] for each in tokens), before)
        torch.testing.assert_close(output[:, :, 0].double(), expected[:, :, place], rtol=0, atol=1e-5)
    torch.testing.assert_close(before.double(), after, rtol=0, atol=1e-5)


def test_without_matrices_they_are_zero():
    tokens, triangle = operands(10), Triangle.of(4)
    expected = chunked_delta_rule(*tokens, torch.zeros(1, HEADS, KEY, VALUE), triangle)
    for ours, theirs in zip(chunked_delta_rule(*tokens, None, triangle), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_one_token_over_and_over():
    """Equal keys, full strength, no decay: powers of the triangular system reach 1e17 here, and would cancel."""
    queries, keys, values, decay, strength = operands(64)
    keys = keys[:, :, :1].expand_as(keys)
    tokens = [queries, keys, values, decay * 0, torch.ones_like(strength)]
    expected = by_the_book(*tokens, some_matrices())
    for ours, theirs in zip(
        chunked_delta_rule(*tokens, some_matrices(), Triangle.of(64)), expected, strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fading", [-90.0, -1e4, 0.0])
def test_decays_that_leave_float32(fading):
    """Products of decays underflow: nothing may be divided by one."""
    tokens = operands(33)
    tokens[3] = tokens[3] * 0 + fading
    expected = by_the_book(*tokens, some_matrices())
    for ours, theirs in zip(
        chunked_delta_rule(*tokens, some_matrices(), Triangle.of(16)), expected, strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5)


SIZES = LinearAttention(key_heads=2, value_heads=4, key_dim=6, value_dim=4)


def projections(tokens: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = (SIZES.channels, SIZES.value_heads, SIZES.value_heads)
    mixed, strength, fading = (torch.randn(1, tokens, size, generator=generator) for size in shapes)
    return [mixed * scale, strength, fading, torch.linspace(-9, 1, 4), torch.linspace(-1, 1, 4)]


def context(tokens: int, real: Tensor | None = None) -> Context:
    return Context(torch.arange(tokens)[None], {}, {}, real)


def test_padding_leaves_no_trace():
    """On the left, on the right and between tokens; its own projections are anything but zero."""
    rule, given_projections = Rule(SIZES, 64), projections(11)
    shown = torch.tensor([0, 0, 1, 1, 0, 1, 1, 1, 1, 0, 0]).bool()
    real = shown.float()[None, :, None]
    tokens = [each[:, shown] if each.dim() == 3 else each for each in given_projections]
    expected, after = rule(*tokens, None, context(int(shown.sum())))
    found, kept = rule(*given_projections, None, context(11, real))
    torch.testing.assert_close(found[:, shown], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(kept, after, rtol=0, atol=1e-5)


def test_float16_activations_of_any_size():
    """Queries and keys of 300 have squares beyond 65,504; the rule works in float32 whatever it is given."""
    rule, given_projections = Rule(SIZES, 64), projections(20, scale=300.0)
    halved = [each.half() for each in given_projections]
    expected, after = rule(*(each.float() for each in halved), None, context(20))
    found, kept = rule(*halved, None, context(20))
    assert (halved[0] ** 2).isinf().any() and found.dtype == kept.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(kept, after, rtol=0, atol=0)


def test_why_a_recurrence_is_held_in_float32():
    """A head that forgets a ten-thousandth at each token, after 4,000 tokens: in float16 that decay is one."""
    matrices = {dtype: torch.ones(1, 1, 1, 1, dtype=dtype) for dtype in (torch.float16, torch.float32)}
    decay = torch.tensor(-1e-4)
    for dtype, state in matrices.items():
        for _ in range(4000):
            state = state * decay.to(dtype).exp()
        matrices[dtype] = state
    expected = float((decay.double() * 4000).exp())  # 0.67
    assert abs(float(matrices[torch.float32]) - expected) < 1e-3
    assert abs(float(matrices[torch.float16]) - expected) > 0.3
