"""The decoder of every family against transformers' own model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from edkm_export.decoder.build import build_decoder
from edkm_export.decoder.config import FULL, SLIDING
from edkm_export.decoder.context import MASKED, Context, causal_mask, sliding_mask
from edkm_export.decoder.positions import PositionTables
from edkm_export.decoder.whole_sequence import WholeSequence
from edkm_export.errors import CheckpointError
from tests.helpers.family_draws import random_cases
from tests.helpers.growing_cache import GrowingCache
from tests.helpers.odd_families import CASES, build, build_case, checkpoint_of

LENGTH = 24
TOLERANCE = 1e-4  # float32 on both sides, sums in another order; logits are of size one


@pytest.fixture(scope="module", params=CASES)
def model(request):
    return build(request.param)


def tokens_of(model, batch: int = 1) -> Tensor:
    """int64 [batch, LENGTH]"""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, model.config.vocab_size, (batch, LENGTH), generator=generator)


def context_of(decoder, tables, positions: Tensor, keys: Tensor, hidden: Tensor | None = None) -> Context:
    """Masks for positions [batch, new] and keys [batch, total]; hidden bool [batch, total]: padding."""
    mask = causal_mask(positions, keys)
    if hidden is not None:
        mask = mask.masked_fill(hidden[:, None, None, :], MASKED)
    masks = {FULL: mask}
    if decoder.config.sliding_window is not None:
        masks[SLIDING] = sliding_mask(mask, positions, keys, decoder.config.sliding_window)
    real = None if hidden is None else (~hidden).float()[:, -positions.shape[1] :, None]
    return Context(positions.clamp_min(0), tables(positions.clamp_min(0)), masks, real)


@torch.no_grad()
def test_whole_sequence(model):
    tokens = tokens_of(model)
    expected = model(tokens, use_cache=False).logits
    found = WholeSequence(build_decoder(checkpoint_of(model)), model.config.to_dict(), LENGTH)(tokens.int())
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_prompt_and_single_tokens_with_a_cache(model):
    tokens = tokens_of(model, 2)
    decoder = build_decoder(checkpoint_of(model))
    tables, cache = (
        PositionTables(decoder.config, model.config.to_dict(), 48),
        GrowingCache(decoder.config, 2),
    )
    parts = []
    for start, stop in [(0, 13), (13, 16), *((at, at + 1) for at in range(16, LENGTH))]:
        positions = torch.arange(start, stop).expand(2, -1)
        context = context_of(decoder, tables, positions, torch.arange(stop).expand(2, -1))
        parts.append(decoder(tokens[:, start:stop], context, cache))
    expected = model(tokens, use_cache=False).logits
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_batch_with_left_padding(model):
    tokens = tokens_of(model, 3)
    lengths = torch.tensor([LENGTH, 17, 9])
    positions = torch.arange(LENGTH)[None] - (LENGTH - lengths)[:, None]
    seen = positions >= 0
    decoder = build_decoder(checkpoint_of(model))
    tables = PositionTables(decoder.config, model.config.to_dict(), LENGTH)
    found = decoder(tokens, context_of(decoder, tables, positions, positions, ~seen))
    expected = model(
        tokens, attention_mask=seen.long(), position_ids=positions.clamp_min(0), use_cache=False
    ).logits
    torch.testing.assert_close(found[seen], expected[seen], rtol=0, atol=TOLERANCE)


def test_names_and_shapes_are_those_of_transformers(model):
    made = checkpoint_of(model)
    decoder = build_decoder(made)
    assert decoder.state_dict().keys() == model.state_dict().keys()
    assert (decoder.lm_head.weight is decoder.embedding.weight) == model.config.tie_word_embeddings


def test_a_head_stored_apart_from_a_tied_embedding_is_refused():
    """It would be ignored: the decoder, like transformers, takes the embedding's weight."""
    made = checkpoint_of(build("gemma3"))
    made.dense["lm_head.weight"] = made.dense["model.embed_tokens.weight"] * 2
    made.tied.clear()
    with pytest.raises(CheckpointError, match="lm_head.weight is stored apart, but .* tie_word_embeddings"):
        build_decoder(made)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=random_cases())
@torch.no_grad()
def test_random_configurations(case):
    model = build_case(*case)
    tokens = tokens_of(model)
    found = WholeSequence(build_decoder(checkpoint_of(model)), model.config.to_dict(), LENGTH)(tokens)
    expected = model(tokens, use_cache=False).logits
    # as above, relative where a random model has larger logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=TOLERANCE)
