"""Chunked losses against the plain formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from edkm_export.recipe import uniform_recipe
from edkm_export.training import distillation as module
from edkm_export.training.distillation import Head, cross_entropy, distillation
from edkm_export.training.learner import Learner
from edkm_export.training.palettized.clusters import ClusterMethod
from edkm_export.training.palettized.surgery import insert_clusters
from tests.helpers.odd_models import build

EXACT = {"rtol": 1e-11, "atol": 1e-13}


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [1, 40, 10_000])
def test_divergence_and_gradients(
    monkeypatch: pytest.MonkeyPatch, chunk: int, masked: bool, temperature: float
) -> None:
    monkeypatch.setitem(module._CHUNK_LOGITS, "cpu", chunk)
    hidden, weight, bias, known, original = leaves((13, 6), (20, 6), (20,), (13, 5), (20, 5))
    mask = torch.arange(13) % 3 != 0 if masked else None
    loss = distillation(
        hidden, Head(weight, bias), known, Head(original, None), mask, temperature=temperature
    )
    (3 * loss).backward()
    found = [each.grad for each in (hidden, weight, bias)]
    for each in (hidden, weight, bias):
        each.grad = None
    keep = slice(None) if mask is None else mask
    q = (F.linear(hidden, weight, bias)[keep] / temperature).log_softmax(-1)
    p = (F.linear(known, original)[keep] / temperature).log_softmax(-1).detach()
    plain = (p.exp() * (p - q)).sum(-1).mean() * temperature**2
    (3 * plain).backward()
    torch.testing.assert_close(loss, plain, **EXACT)
    for ours, each in zip(found, (hidden, weight, bias), strict=True):
        torch.testing.assert_close(ours, each.grad, **EXACT)


def test_cross_entropy_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module._CHUNK_LOGITS, "cpu", 45)
    hidden, weight = leaves((11, 4), (15, 4))
    targets = torch.tensor([3, -1, 14, 0, 7, 7, -1, 2, 9, 1, 5])
    loss = cross_entropy(hidden, Head(weight, None), targets)
    loss.backward()
    found = [hidden.grad, weight.grad]
    hidden.grad = weight.grad = None
    plain = F.cross_entropy(hidden @ weight.t(), targets, ignore_index=-1)
    plain.backward()
    torch.testing.assert_close(loss, plain, **EXACT)
    torch.testing.assert_close(found[0], hidden.grad, **EXACT)
    torch.testing.assert_close(found[1], weight.grad, **EXACT)


@pytest.mark.parametrize("objective", ["distillation", "cross-entropy"])
def test_the_learner_agrees_with_whole_logits(objective: str) -> None:
    """In chunks and as a whole: loss and the gradient of every parameter of a palettized model."""
    ids = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
    counts = torch.rand(2, 12, generator=torch.Generator().manual_seed(1)) > 0.4
    grads = []
    for in_chunks in (True, False):
        model = build("untied").double()
        teacher = build("untied", seed=1).double() if objective == "distillation" else None
        insert_clusters(model, uniform_recipe(3, 8), method=ClusterMethod())
        learner = Learner(model, teacher, objective=objective, temperature=1.5)
        assert learner.in_chunks
        learner.in_chunks = in_chunks
        loss = learner(ids, counts)
        loss.backward()
        grads.append({"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}})
    for name, grad in grads[0].items():
        # the logits are taken to float32 there, as transformers does
        torch.testing.assert_close(grad.double(), grads[1][name].double(), rtol=1e-4, atol=1e-5, msg=name)
        assert grad.abs().sum() > 0


def test_models_that_change_their_logits_are_not_cut() -> None:
    model = build("plain")
    model.config.final_logit_softcapping = 30.0
    assert not module.has_plain_head(model)
