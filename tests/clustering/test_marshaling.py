from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from edkm_export.clustering import MarshaledTensors, optimal_centroids
from edkm_export.clustering.dense import cluster_dense
from edkm_export.errors import PaletteError

K, TAU = 8, 1e-4


def cluster(weight: torch.Tensor, context):
    """Soft weight and both gradients of DKM in the weight's own dtype, and the bytes held in between."""
    weight = weight.clone().requires_grad_()
    centroids = optimal_centroids(weight.detach(), K)[0].to(weight.dtype)[..., None].requires_grad_()
    tau = torch.full((len(weight),), TAU, dtype=weight.dtype)
    with context:
        soft, _ = cluster_dense(weight[..., None], centroids, tau, 1)
    size = context.size_bytes if isinstance(context, MarshaledTensors) else 0
    upstream = torch.randn(soft.shape, generator=torch.Generator().manual_seed(1)).to(soft.dtype)
    soft.backward(upstream)
    return (soft.detach(), weight.grad, centroids.grad), size


def gaussian(groups: int, m: int) -> torch.Tensor:
    return (torch.randn(groups, m, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("marshal", "uniquify"), itertools.product([False, True], repeat=2))
def test_gradients_are_untouched(groups, marshal, uniquify):
    weight = gaussian(groups, 40_000)
    expected, _ = cluster(weight, torch.enable_grad())
    found, size = cluster(weight, MarshaledTensors(weight, marshal=marshal, uniquify=uniquify))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert size > 0


@pytest.mark.parametrize("groups", [1, 2])
def test_bytes_are_those_of_the_paper(groups):
    weight = gaussian(groups, 1 << 18)
    mib = weight.numel() * 2  # of the weight; the attention map has K times as many
    distinct = sum(len(row.unique()) for row in weight)
    slack = 1000  # masses and centroids
    sizes = {}
    for marshal, uniquify in itertools.product([False, True], repeat=2):
        _, sizes[marshal, uniquify] = cluster(
            weight, MarshaledTensors(weight, marshal=marshal, uniquify=uniquify)
        )
    # Autograd saves w - c, A (by the softmax and by two products) and the weight (by one product).
    assert abs(sizes[False, False] - (4 * K + 1) * mib) <= slack
    # M: w - c, A and the weight once each; at 4096x4096 and 3 bits 544 MiB.
    assert abs(sizes[True, False] - (2 * K + 1) * mib) <= slack
    # M + U: w - c and A as a table and an index of 2 bytes a weight each; 96 MiB.
    assert abs(sizes[True, True] - 3 * mib - 2 * distinct * K * 2) <= slack


def test_rows_that_differ_are_kept():
    weight = gaussian(1, 1000)
    values = torch.randn(1000, 4, requires_grad=True)
    with MarshaledTensors(weight):
        loss = (values**2).sum()
    loss.backward()
    assert torch.equal(values.grad, 2 * values.detach())


def test_an_address_that_is_used_again_is_no_mistake():
    # Under U the saved storages are freed at once, and the allocator hands their addresses out again.
    weight = gaussian(1, 4000)
    powers = torch.arange(1, 5, requires_grad=True, dtype=torch.float32)

    def loss() -> torch.Tensor:
        rows = weight.float()[..., None] * powers  # equal weights, equal rows
        return sum((rows * (1 + step)).tanh().exp().mean() for step in range(20))

    (expected,) = torch.autograd.grad(loss(), powers)
    with MarshaledTensors(weight):
        value = loss()
    (found,) = torch.autograd.grad(value, powers)
    assert torch.equal(found, expected)


def test_bytes_are_released_with_the_graph():
    weight = gaussian(1, 1000)
    values = weight.float().requires_grad_()
    context = MarshaledTensors(weight)
    with context:
        loss = values.exp().sum()
    assert context.size_bytes == 4000
    del loss
    assert context.size_bytes == 0


def test_uniquify_needs_a_weight():
    with pytest.raises(PaletteError, match="needs the weight"):
        MarshaledTensors()
    MarshaledTensors(uniquify=False)


def learner(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.set_num_threads(1)
    weight = gaussian(2, 70_001)  # an odd number: the shares are padded
    expected, _ = cluster(weight, torch.enable_grad())
    sizes = []
    for uniquify in (False, True):
        context = MarshaledTensors(weight, uniquify=uniquify, process_group=dist.group.WORLD)
        found, size = cluster(weight, context)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        sizes.append(size)
    alone = [cluster(weight, MarshaledTensors(weight, uniquify=uniquify))[1] for uniquify in (False, True)]
    torch.save((sizes, alone), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_learners_hold_a_half_each(tmp_path: Path):
    mp.spawn(learner, args=(str(tmp_path),), nprocs=2)
    table = 2 * 2 * 5000 * K * 2  # at most: two groups of 5,000 distinct rows, two tensors; not sharded
    for rank in range(2):
        sizes, alone = torch.load(tmp_path / f"{rank}.pt")
        assert abs(sizes[0] - alone[0] / 2) <= 1000
        assert alone[1] / 2 <= sizes[1] <= alone[1] / 2 + table
