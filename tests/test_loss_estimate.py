"""The estimate of the loss against transformers' own model and straightforward arithmetic."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import transformers

from edkm_export.errors import InputError
from edkm_export.loss_estimate import LossEstimate, Predictions, estimate_tokens
from edkm_export.palettization import palettize_model
from edkm_export.recipe import uniform_recipe
from tests.helpers.odd_models import build


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["plain", "untied_and_biased", "gpt2"])
def test_against_two_models_side_by_side(kind, dtype):
    """Weights in 16 bits, sums in float32; the original's logits are kept in float16, an error of 5e-4 of them."""
    model = (gpt2() if kind == "gpt2" else build(kind)).to(dtype)
    original = copy.deepcopy(model).float()
    windows = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(1))
    done = []
    predictions = Predictions(model, windows, advance=lambda: done.append(1))
    parts = palettize_model(model, uniform_recipe(2, 8))
    found = predictions.compare(model, parts.palettized)

    hard = copy.deepcopy(original)
    turned = {name for name in parts.palettized if kind == "gpt2" and ".h." in name}
    for name, tensor in parts.palettized.items():
        values = tensor.decode().float()
        hard.get_parameter(name).data.copy_(values.t() if name in turned else values)
    kl, agree, losses = [], [], {"original": [], "hard": []}
    for window in windows:
        logits = {
            name: each(input_ids=window[None]).logits[0].double()
            for name, each in (("original", original), ("hard", hard))
        }
        p, q = (logits[name].log_softmax(-1) for name in ("original", "hard"))
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        agree += (p.argmax(-1) == q.argmax(-1)).tolist()
        for name, values in (("original", p), ("hard", q)):
            losses[name] += (-values[:-1].gather(-1, window[1:, None])).flatten().tolist()
    assert len(done) == 4 and found.tokens == 48
    assert found.perplexity_original == pytest.approx(
        math.exp(sum(losses["original"]) / len(losses["original"])), rel=1e-4
    )
    assert found.perplexity_palettized == pytest.approx(
        math.exp(sum(losses["hard"]) / len(losses["hard"])), rel=1e-4
    )
    assert found.kl == pytest.approx(sum(kl) / len(kl), rel=5e-3)
    assert found.kl > 5e-5  # 2 bits change something; an untrained GPT-2 is close to uniform either way
    assert found.top1 == pytest.approx(
        sum(agree) / len(agree), abs=1.5 / 48
    )  # a near tie may fall either way


def test_tokens_of_another_vocabulary():
    with pytest.raises(InputError, match="token 999 is beyond the model's vocabulary of 320"):
        Predictions(build("plain"), torch.full((1, 8), 999))


def test_a_large_vocabulary_has_fewer_tokens():
    assert estimate_tokens(1000) == estimate_tokens(131_072) == 512
    assert estimate_tokens(262_144) == 256 and estimate_tokens(10**9) == 64


@pytest.mark.parametrize(
    ("palettized", "tolerable"),
    [(10.0, True), (15.0, True), (15.1, False), (math.inf, False), (math.nan, False)],
)
def test_what_is_tolerable(palettized, tolerable):
    found = LossEstimate(512, 10.0, palettized, 0.123456789, 0.5)
    assert found.is_tolerable == tolerable
    if math.isfinite(palettized):
        assert found.record() == {
            "tokens": 512, "perplexity_original": 10.0, "perplexity_palettized": palettized, "kl": 0.12346, "top1": 0.5,
            "perplexity_ratio": palettized / 10,
        }  # fmt: skip
