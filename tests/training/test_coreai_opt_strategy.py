"""eDKM in coreai-opt: gradients, grid, what finalize gives, and whether it helps."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from edkm_export.clustering import hard_assign, optimal_centroids
from edkm_export.errors import PaletteError
from edkm_export.importing import import_state
from edkm_export.training.coreai_opt_strategy import register, train_weight


@pytest.fixture
def groups():
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize("method", ["straight-through", "soft", "dkm"])
def test_gradients_reach_the_weight_and_centroids_are_on_the_grid(groups, method):
    centroids = optimal_centroids(groups.detach(), 4)[0].float().half().float()
    seen, after = train_weight(groups, centroids, method=method, alpha=1.0, iterations=2)
    seen.square().sum().backward()
    assert bool((groups.grad.abs().sum(1) > 0).all())
    assert torch.equal(after, after.half().float())
    hard = centroids.gather(1, hard_assign(groups.detach(), centroids).long())
    near = torch.allclose(seen, hard, rtol=0, atol=1e-6)
    assert near is (method != "dkm")


def test_straight_through_moves_centroids_to_the_means(groups):
    centroids = torch.tensor([[-1.0, -0.5, 0.5, 9.0]]).expand(3, 4).contiguous()
    _, after = train_weight(groups, centroids, method="straight-through", alpha=1.0, iterations=1)
    weight, indices = groups.detach(), hard_assign(groups.detach(), centroids)
    for group in range(3):
        for entry in range(3):
            mean = weight[group][indices[group] == entry].double().mean()
            assert float(after[group, entry]) == float(mean.half())
    assert after[:, 3].tolist() == [9.0] * 3  # attracts nothing


# With coreai-opt itself

kmeans = pytest.importorskip("coreai_opt.palettization", reason="needs coreai-opt")


@pytest.fixture(scope="module")
def teacher():
    """A small trained model: a random one has nothing that palettization could break."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
    x = torch.randn(512, 32)
    y = torch.stack([(x[:, i] * x[:, i + 1]).tanh() for i in range(8)], dim=1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(400):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), x


def trained(teacher, n_bits: int, seed: int, strategy: dict | None, steps: int = 150):
    from coreai_opt.palettization import (
        KMeansPalettizer,
        KMeansPalettizerConfig,
        ModuleKMeansPalettizerConfig,
        PalettizationSpec,
    )
    from coreai_opt.palettization.spec import PerGroupedChannelGranularity

    register()
    model, x = teacher
    target = model(x).detach()
    spec = PalettizationSpec(
        n_bits=n_bits,
        granularity=PerGroupedChannelGranularity(axis=0, group_size=8),
        **({} if strategy is None else {"training_strategy_spec": {"type": "edkm", **strategy}}),
    )
    config = KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        palettizer = KMeansPalettizer(copy.deepcopy(model), config)
        student = palettizer.prepare((x[:4],))
        optimizer = torch.optim.Adam(student.parameters(), 1e-3)
        with palettizer.training_mode():
            student.train()
            for _ in range(steps):
                batch = torch.randint(len(x), (128,))
                loss = (student(x[batch]) - target[batch]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        student.eval()
        hard = student(x).detach()
        done = palettizer.finalize(student)
    return hard, done, float((done(x).detach() - target).square().mean())


def test_vectors_are_refused():
    from types import SimpleNamespace

    from coreai_opt.palettization.spec.training_strategy import TrainingStrategySpec

    register()
    strategy = TrainingStrategySpec.REGISTRY["edkm"]().build_strategy()
    with pytest.raises(PaletteError, match="cluster_dim is 2"):
        strategy.train_forward(SimpleNamespace(cluster_dim=2), torch.zeros(4, 4))


def test_what_finalize_gives_is_what_was_trained(teacher):
    hard, done, _ = trained(teacher, 3, 0, {"method": "soft", "alpha": 0.5}, steps=5)
    _, x = teacher
    assert torch.equal(done(x), hard)
    found = import_state(done.state_dict(), "finalized")
    assert found.palettized.keys() == {"0.weight", "2.weight"} and found.dense.keys() == {"0.bias", "2.bias"}
    for name, tensor in found.palettized.items():
        assert tensor.n_bits == 3 and tensor.group_size == 8
        assert torch.equal(tensor.decode().float(), done[int(name[0])].weight)


@pytest.mark.slow
@pytest.mark.parametrize("n_bits", [2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_is_better_than_their_default_after_as_many_steps(teacher, n_bits, seed):
    _, _, plain = trained(teacher, n_bits, seed, None)
    _, _, ours = trained(teacher, n_bits, seed, {"method": "soft", "alpha": 0.5})
    assert ours < plain
