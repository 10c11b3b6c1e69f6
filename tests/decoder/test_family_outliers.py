"""Newer families with activations of the size that trained models have, natively in float16.

docs/families.md, "Numbers that float16 cannot hold", has the reasons.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from edkm_export.checkpoint import Checkpoint
from edkm_export.decoder import short_convolution
from edkm_export.decoder.build import build_decoder
from edkm_export.decoder.families import exaone4, olmo
from edkm_export.decoder.whole_sequence import WholeSequence
from tests.helpers.odd_families import checkpoint_of
from tests.helpers.outlier_families import (
    MASSIVE,
    POST_NORMS,
    PRE_NORMS,
    stream,
    with_loud_convolutions,
    with_loud_recurrences,
    with_massive_activations,
    with_wide_stream,
)

LENGTH = 24
TOKENS = torch.randint(3, 96, (1, LENGTH), generator=torch.Generator().manual_seed(3))
TOKENS[0, 0] = 1  # as no other


def rounded(model: Any) -> tuple[Any, Checkpoint]:
    """The model with weights that float16 holds, in float32, and its checkpoint."""
    model = model.half().float()
    return model, checkpoint_of(model)


@torch.no_grad()
def in_float16(checkpoint: Checkpoint) -> Tensor:
    """Logits of our decoder, every operation in float16."""
    whole = WholeSequence(build_decoder(checkpoint, torch.float16), checkpoint.config, LENGTH).half()
    for name, buffer in whole.named_buffers():
        if "triangle" in name:  # of a recurrence, which is float32 in every format
            buffer.data = buffer.float()
    return whole(TOKENS)[0].float()


@torch.no_grad()
def divergence(model: Any, found: Tensor) -> float:
    """Largest KL divergence of any position from transformers' own model in float32."""
    expected = model(TOKENS, use_cache=False).logits[0].double().log_softmax(-1)
    assert expected.std() > 0.3  # the model does what it is for
    return float((expected.exp() * (expected - found.double().log_softmax(-1))).sum(-1).max())


QUICK = ("granite", "lfm2", "stablelm")


@pytest.mark.parametrize(
    "case",
    [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in PRE_NORMS],
)
def test_massive_activations(case):
    model, checkpoint = rounded(with_massive_activations(case, TOKENS))
    assert stream(model, TOKENS).abs().max() > MASSIVE / 2
    found = in_float16(checkpoint)
    assert found.isfinite().all()
    assert divergence(model, found) < 1e-3  # 1e-4 at most as measured


@pytest.mark.parametrize("case", POST_NORMS)
def test_a_wide_stream_behind_no_norm(case, monkeypatch):
    model, checkpoint = rounded(with_wide_stream(case, 300.0))
    found = in_float16(checkpoint)
    assert found.isfinite().all()
    assert divergence(model, found) < 1e-5  # 1e-6 as measured
    monkeypatch.setattr(olmo, "POST_NORM_INNER_SCALE", 1.0)
    monkeypatch.setattr(exaone4, "POST_NORM_INNER_SCALE", 1.0)
    assert not in_float16(checkpoint).isfinite().all()  # which is what the scale is for


def test_loud_convolutions(monkeypatch):
    """Products of two projections pass 65,504, those of three by far."""
    model, checkpoint = rounded(with_loud_convolutions(150.0))
    found = in_float16(checkpoint)
    assert found.isfinite().all()
    assert divergence(model, found) < 1e-3
    monkeypatch.setattr(short_convolution, "_SCALE", 1.0)
    assert not in_float16(checkpoint).isfinite().all()


def test_loud_queries_and_keys_of_a_recurrence():
    """Their squares, whose sum their length is made of, pass 65,504."""
    model, checkpoint = rounded(with_loud_recurrences(1000.0))
    found = in_float16(checkpoint)
    assert found.isfinite().all()
    assert divergence(model, found) < 1e-3
