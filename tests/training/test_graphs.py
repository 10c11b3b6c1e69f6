"""Steps recorded as CUDA graphs, and clusters handled together, against the same things done one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from edkm_export.checkpoint import load
from edkm_export.recipe import uniform_recipe
from edkm_export.reference.source import Source
from edkm_export.training import trainer
from edkm_export.training.graphs import GraphedStep, can_record
from edkm_export.training.learner import Learner
from edkm_export.training.optimizer import build_optimizer, freeze
from edkm_export.training.palettized.batch import ClusterBatch
from edkm_export.training.palettized.clusters import ClusterMethod
from edkm_export.training.palettized.surgery import attach, clusters_of, insert_clusters
from edkm_export.training.run import Run
from edkm_export.training.train_config import TrainConfig
from tests.helpers.paths import FIXTURES

CONFIG = TrainConfig(bf16=False, bits=3, group_size=16)


def learner(device: str, distill: bool) -> Learner:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).float().to(device)
    teacher = (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).to(device).requires_grad_(False)
    )
    insert_clusters(model, uniform_recipe(3, 16), method=ClusterMethod("straight-through"))
    freeze(model, CONFIG)
    model.train()
    return Learner(
        model, teacher if distill else None, objective="distillation" if distill else "cross-entropy"
    )


def train(steps: int, accumulate: int, *, together: bool, distill: bool) -> tuple[list[float], dict]:
    found = learner("cuda", distill)
    optimizer = build_optimizer(found.model, CONFIG)
    attach(found, optimizer)
    batch = ClusterBatch(list(clusters_of(found.model).values()))
    graph = None
    if together:
        assert batch.defer() and can_record(found)
        graph = GraphedStep(found, divide=accumulate, bf16=False)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        for _ in range(accumulate):
            ids = torch.randint(300, (2, 32), generator=generator)
            if graph is not None and graph.takes({"input_ids": ids}):
                loss = graph(ids)
            else:
                loss = found(ids.cuda()) / accumulate
                loss.backward()
            losses.append(float(loss.detach()))
        batch.gradients()
        optimizer.step()
        batch.refresh()
        optimizer.zero_grad()
    return losses, {name: value.cpu() for name, value in found.model.state_dict().items()}


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("distill", [False, True])
def test_recorded_steps_train_alike(accumulate: int, distill: bool) -> None:
    alone, alone_state = train(7, accumulate, together=False, distill=distill)
    together, together_state = train(7, accumulate, together=True, distill=distill)
    # Sums are taken in another order, and Adam's first steps turn a changed sign of a tiny gradient into a step.
    assert together == pytest.approx(alone, rel=2e-4)
    for name, value in alone_state.items():
        if value.is_floating_point():
            off = float((value - together_state[name]).abs().mean() / value.abs().mean().clamp_min(1e-6))
            assert off < 2e-3, name
        else:
            assert float((value != together_state[name]).float().mean()) < 0.01, name


@pytest.mark.gpu
def test_gradients_of_luts_are_those_of_each_layer() -> None:
    ids = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(2)).cuda()
    found = {}
    for together in (False, True):
        own = learner("cuda", False)
        batch = ClusterBatch(list(clusters_of(own.model).values()))
        assert not together or batch.defer()
        own(ids).backward()
        batch.gradients()
        found[together] = {
            name: each.lut.grad.clone()
            for name, each in clusters_of(own.model).items()
            if each.lut.requires_grad
        }
    assert found[False].keys() == found[True].keys() and found[False]
    for name, expected in found[False].items():
        # float32 sums in another order; a tied weight has two summands.
        torch.testing.assert_close(
            found[True][name], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
        )


class Replayed(GraphedStep):
    """Stands in for a recorded graph where there is no CUDA: gradients live at fixed places, as after recording."""

    calls = 0

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        Replayed.calls += 1
        if not self._trained:
            self._trained = [each for each in self.learner.parameters() if each.requires_grad]
            self._gradients = [torch.zeros_like(each) for each in self._trained]
        self._put_back()
        return self._passes(input_ids)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_trainer_runs_recorded_steps_like_others(
    accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeroed, put back, added up, clipped and logged as gradients of ordinary steps are: the same bits."""
    config = TrainConfig(
        bits=2, steps=4, batch_size=2, accumulate=accumulate, context=32, calibration_tokens=128, log_every=1
    )
    source, data = Source.parse(str(FIXTURES / "tiny-llama")), [FIXTURES / "calibration.txt"]
    Run(source, data, tmp_path / "plain", config).complete(device="cpu")
    monkeypatch.setattr(trainer, "can_record", lambda learner: True)
    monkeypatch.setattr(trainer, "GraphedStep", Replayed)
    Run(source, data, tmp_path / "replayed", config).complete(device="cpu")
    assert Replayed.calls >= 4 * accumulate
    plain, replayed = (load(tmp_path / name / "model.pt") for name in ("plain", "replayed"))
    assert all(replayed.palettized[name].same_bits(each) for name, each in plain.palettized.items())
    assert all(torch.equal(replayed.dense[name], each) for name, each in plain.dense.items())


def test_no_recording_on_a_cpu() -> None:
    own = learner("cpu", False)
    assert not can_record(own)
    batch = ClusterBatch(list(clusters_of(own.model).values()))
    assert not batch.defer()
