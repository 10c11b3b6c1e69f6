"""Palettized modules: gradients against dense autograd, saved tensors, once-a-step refresh."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edkm_export.clustering import soft_cluster
from edkm_export.recipe import Rule
from edkm_export.training.palettized.batch import ClusterBatch
from edkm_export.training.palettized.clusters import ClusterMethod, Clusters
from edkm_export.training.palettized.modules import (
    PalettizedConv1D,
    PalettizedConv2d,
    PalettizedEmbedding,
    PalettizedLinear,
)
from edkm_export.training.palettized.surgery import attach, seed_centroids

EXACT: dict[str, float] = {
    "rtol": 1e-10,
    "atol": 1e-12,
}  # float64 sums of some hundred terms in another order


def make_clusters(
    shape: tuple[int, ...], rule: Rule, method: ClusterMethod | None = None, seed: int = 0
) -> Clusters:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    centroids, _ = seed_centroids(weight, rule)
    return Clusters(weight, centroids, rule, method or ClusterMethod())


def dense_from_lut(clusters: Clusters, lut: Tensor) -> Tensor:
    """The palettized weight as plain autograd sees it: float16 entries, rounding passed straight through."""
    real = lut * clusters.unit
    rounded = real + (clusters.rounded().values.double() - real).detach()
    group = torch.arange(clusters.groups)[:, None]
    return rounded[group, clusters.indices.long()].view(clusters.weight.shape)


def lut_share(clusters: Clusters) -> float:
    """The documented factor on LUT gradients."""
    return (clusters.indices.shape[1] / clusters.k) ** -0.5


def check_straight_through(clusters: Clusters, run: Any, run_dense: Any, inputs: list[Tensor]) -> None:
    """Compare output and all gradients with those of the dense weight."""
    lut = clusters.lut.detach().clone().requires_grad_()
    dense = dense_from_lut(clusters, lut)
    dense.retain_grad()
    twins = [each.detach().clone().requires_grad_() if each.is_floating_point() else each for each in inputs]
    expected = run_dense(dense, *twins)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    expected.backward(upstream)
    found = run(*inputs)
    found.backward(upstream)
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(clusters.weight.grad, dense.grad, **EXACT)
    torch.testing.assert_close(clusters.lut.grad, lut.grad * lut_share(clusters), **EXACT)
    for own, twin in zip(inputs, twins, strict=True):
        if own.is_floating_point():
            torch.testing.assert_close(own.grad, twin.grad, **EXACT)


@pytest.mark.parametrize("lut_dtype", ["float16", "int8", "int4"])
@pytest.mark.parametrize("group_size", [0, 4])
def test_linear_gradients_equal_dense_autograd(group_size: int, lut_dtype: Any) -> None:
    clusters = make_clusters((12, 10), Rule(bits=3, group_size=group_size, lut_dtype=lut_dtype))
    bias = nn.Parameter(torch.randn(12, dtype=torch.float64))
    x = torch.randn(2, 7, 10, dtype=torch.float64, requires_grad=True)
    module = PalettizedLinear(clusters, bias)
    check_straight_through(clusters, module, lambda dense, x: F.linear(x, dense, bias.detach()), [x])
    assert bias.grad is not None and bias.grad.abs().sum() > 0


@pytest.mark.parametrize("group_size", [0, 5])
def test_embedding_gradients_equal_dense_autograd(group_size: int) -> None:
    clusters = make_clusters((20, 6), Rule(bits=4, group_size=group_size))
    ids = torch.tensor([[3, 19, 3], [0, 7, 2]])
    module = PalettizedEmbedding(clusters, padding_idx=2)
    check_straight_through(clusters, module, lambda dense, ids: F.embedding(ids, dense, padding_idx=2), [ids])


@pytest.mark.parametrize("padding", [0, 1, "same", "valid"])
def test_conv2d_gradients_equal_dense_autograd(padding: Any) -> None:
    clusters = make_clusters((8, 3, 4, 3), Rule(bits=2, group_size=4))
    like = nn.Conv2d(6, 8, (4, 3), padding=padding, groups=2, dilation=(1, 2), dtype=torch.float64)
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64, requires_grad=True)
    module = PalettizedConv2d(clusters, like.bias, like)

    def dense_conv(dense: Tensor, x: Tensor) -> Tensor:
        assert like.bias is not None
        return F.conv2d(x, dense, like.bias.detach(), padding=padding, groups=2, dilation=(1, 2))

    check_straight_through(clusters, module, dense_conv, [x])


def test_conv1d_is_a_turned_linear() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    old = Conv1D(8, 6).double()
    rule = Rule(bits=8, group_size=0)
    weight = old.weight.data.t().contiguous()
    module = PalettizedConv1D(
        Clusters(weight, seed_centroids(weight, rule)[0], rule, ClusterMethod()), old.bias
    )
    x = torch.randn(3, 6, dtype=torch.float64)
    # 48 weights, 256 entries: each has its own, and float16 rounding (2**-11) is all that is left
    torch.testing.assert_close(module(x), old(x), rtol=2e-3, atol=2e-3)


def test_soft_gradient_is_that_of_soft_clustering() -> None:
    """Forward hard; the master weight's gradient is that of k-means attention for the same upstream gradient."""
    method = ClusterMethod("soft", alpha=1.5, iterations=2)
    clusters = make_clusters((8, 9), Rule(bits=2, group_size=4), method)
    x = torch.randn(5, 9, dtype=torch.float64)
    module = PalettizedLinear(clusters, None)
    y = module(x)
    torch.testing.assert_close(y, x @ dense_from_lut(clusters, clusters.lut.detach()).t(), **EXACT)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    leaf = clusters.weight.detach().clone().requires_grad_()
    soft, _ = soft_cluster(
        leaf.view(2, -1), clusters.centroids(), temperature=clusters.temperature, iterations=2, method="dense"
    )
    soft.backward((upstream.t() @ x).view(2, -1))
    torch.testing.assert_close(clusters.weight.grad, leaf.grad, **EXACT)
    # ... which is far from the straight-through one
    assert (clusters.weight.grad - upstream.t() @ x).abs().max() > 0.1


def test_dkm_is_soft_in_both_passes_and_hard_when_it_ships() -> None:
    method = ClusterMethod("dkm", alpha=1.0, iterations=3)
    clusters = make_clusters((8, 9), Rule(bits=2, group_size=0), method)
    module = PalettizedLinear(clusters, None).train()
    x = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(5, 8, dtype=torch.float64)
    y = module(x)
    y.backward(upstream)
    leaf = clusters.weight.detach().clone().requires_grad_()
    twin = x.detach().clone().requires_grad_()
    soft, last = soft_cluster(
        leaf.view(1, -1), clusters.centroids(), temperature=clusters.temperature, iterations=3, method="dense"
    )
    expected = twin @ soft.view(8, 9).t()
    expected.backward(upstream)
    torch.testing.assert_close(y, expected, **EXACT)
    torch.testing.assert_close(clusters.weight.grad, leaf.grad, **EXACT)
    torch.testing.assert_close(x.grad, twin.grad, **EXACT)
    clusters.refresh()  # after the optimizer's step: the LUT is where the iteration ended
    torch.testing.assert_close(clusters.centroids(), last.detach(), **EXACT)
    hard = module.eval()(x)
    torch.testing.assert_close(hard, x @ clusters.export("w").decode().double().t(), **EXACT)


def test_backward_saves_no_float_tensor_of_the_weights_size() -> None:
    clusters = make_clusters((64, 48), Rule(bits=3, group_size=16))
    module = PalettizedLinear(clusters, None)
    x = torch.randn(4, 48, dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x)
    large = [each for each in kept if each.numel() >= clusters.weight.numel()]
    allowed = {clusters.weight.data_ptr(), clusters.indices.data_ptr()}
    assert {each.data_ptr() for each in large} == allowed  # references, not copies
    assert sum(each.numel() for each in kept if each.data_ptr() not in allowed) <= x.numel() + 4 * 8 * 2


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("backward", ["straight-through", "dkm"])
def test_indices_change_once_a_step_under_accumulation_and_checkpointing(
    backward: Any, attached: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clusters = make_clusters((16, 8), Rule(bits=2, group_size=4), ClusterMethod(backward))
    module = PalettizedLinear(clusters, None).train()
    calls = []
    refresh = Clusters.refresh
    monkeypatch.setattr(Clusters, "refresh", lambda self: (calls.append(1), refresh(self)))
    optimizer = torch.optim.AdamW(clusters.parameters(), lr=0.05, fused=fused)
    if attached:
        attach(module, optimizer)
    for _ in range(3):
        for _ in range(4):
            x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
            y = checkpoint(module, x, use_reentrant=False)
            y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(calls) == 2  # before the second and third step; nothing changed before the first
    clusters.fresh()
    assert len(calls) == 3
    assert int(clusters.moved) > 0


# How an optimizer writes, and whether version counters tell (torch 2.13: all but fused ones do).
OPTIMIZERS: dict[str, Any] = {
    "plain": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, foreach=False),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, fused=True),
    "fused SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, fused=True),
    "fused, one value": lambda parameters: OneValue(parameters, {}),
}


class OneValue(torch.optim.Optimizer):
    """Moves one weight only, by one unit in its last place, and hides it from the version counter."""

    def step(self, closure: Any = None) -> None:
        value = self.param_groups[0]["params"][0].data.view(-1)
        value[7] = torch.nextafter(value[7], torch.tensor(9.0, dtype=value.dtype))


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_no_step_goes_unseen(kind: str, attached: bool) -> None:
    """After each, with or without gradients set to None in between, the product is that of the weights as they are."""
    clusters = make_clusters((16, 8), Rule(bits=2, group_size=4))
    module = PalettizedLinear(clusters, None)
    optimizer = OPTIMIZERS[kind]([clusters.weight, clusters.lut])
    if attached:
        attach(module, optimizer)
    x = torch.randn(5, 8, dtype=torch.float64)
    module(x).square().mean().backward()
    for clear in (True, False, False):  # the last step goes by the gradient of the one before
        if clear:
            optimizer.step()
            optimizer.zero_grad()
            assert clusters.is_stale
            module(x).square().mean().backward()
        optimizer.step()
        assert clusters.is_stale
        found = module(x)
        assert not clusters.is_stale
        again = Clusters(clusters.weight, clusters.centroids(), clusters.rule, clusters.method)
        torch.testing.assert_close(found, x @ again.export("w").decode().double().t(), **EXACT)


def test_a_step_of_other_parameters_is_none_of_ours() -> None:
    clusters = make_clusters((16, 8), Rule(bits=2, group_size=4))
    module = PalettizedLinear(clusters, nn.Parameter(torch.zeros(16, dtype=torch.float64)))
    optimizer = torch.optim.SGD([module.bias], lr=0.1)
    attach(module, optimizer)
    module(torch.randn(5, 8, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    assert not clusters.is_stale and not clusters.is_attached


def test_a_copy_does_not_rely_on_the_optimizer_of_its_original() -> None:
    module = PalettizedLinear(make_clusters((16, 8), Rule(bits=2, group_size=4)), None)
    attach(module, torch.optim.AdamW(module.parameters()))
    twin = copy.deepcopy(module)
    assert module.clusters.is_attached and not twin.clusters.is_attached
    optimizer = torch.optim.AdamW(twin.parameters(), fused=True)
    twin(torch.randn(5, 8, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    assert twin.clusters.is_stale and not module.clusters.is_stale


def test_indices_that_change_between_forward_and_backward_are_an_error() -> None:
    clusters = make_clusters((16, 8), Rule(bits=2, group_size=4))
    y = PalettizedLinear(clusters, None)(torch.randn(5, 8, dtype=torch.float64, requires_grad=True))
    with torch.no_grad():
        clusters.weight.mul_(-1)
    clusters.refresh()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_refit_moves_centroids_to_the_mean_of_their_weights() -> None:
    clusters = make_clusters((8, 16), Rule(bits=2, group_size=8))
    with torch.no_grad():
        clusters.lut.add_(0.2)
    clusters.fresh()
    before = clusters.indices.clone()
    clusters.refit()
    weight = clusters.weight.detach().view(-1)
    means = [float(weight[before.view(-1) == j].mean()) for j in range(4)]
    torch.testing.assert_close(clusters.centroids()[0], torch.tensor(means, dtype=torch.float64), **EXACT)


def test_a_bfloat16_product_sees_the_weights_that_ship() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 32, generator=generator) * torch.logspace(-7, 0, 16)[:, None]  # into subnormals
    rule = Rule(bits=4, group_size=1)
    clusters = Clusters(weight, seed_centroids(weight, rule)[0], rule, ClusterMethod(), in_bfloat16=True)
    decoded = clusters.export("w").decode()
    assert decoded.abs().max() > 0
    assert torch.equal(decoded.bfloat16().float(), decoded.float())
    assert torch.equal(PalettizedLinear(clusters, None).dense_weight(torch.bfloat16).float(), decoded.float())
    plain = Clusters(weight, seed_centroids(weight, rule)[0], rule, ClusterMethod()).export("w").decode()
    assert not torch.equal(plain.bfloat16().float(), plain.float())  # the grid is needed


def test_a_bfloat16_product_sees_an_int4_grid_as_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 32, generator=generator) * torch.logspace(-7, 0, 16)[:, None]
    for in_bfloat16 in (False, True):
        rule = Rule(bits=3, group_size=1, lut_dtype="int4")
        clusters = Clusters(
            weight, seed_centroids(weight, rule)[0], rule, ClusterMethod(), in_bfloat16=in_bfloat16
        )
        decoded = clusters.export("w").decode()
        assert decoded[4:].abs().amin(1).max() > 0
        assert torch.equal(
            PalettizedLinear(clusters, None).dense_weight(torch.bfloat16).float(), decoded.float()
        )


def test_large_luts_are_straight_through_in_any_method() -> None:
    clusters = make_clusters((16, 64), Rule(bits=8, group_size=0), ClusterMethod("dkm"))
    assert clusters.method.backward == "straight-through" and clusters.lut.requires_grad


@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_refreshing_together_is_refreshing_each(in_bfloat16: bool) -> None:
    def make() -> list[Clusters]:
        found = []
        for seed, (rule, shape) in enumerate(
            [
                (Rule(bits=2, group_size=4), (16, 8)),
                (Rule(bits=3, group_size=0), (8, 12)),
                (Rule(bits=3, group_size=2, lut_dtype="int8"), (4, 20)),
                (Rule(bits=2, group_size=2, lut_dtype="int4"), (4, 20)),
                (Rule(bits=3, group_size=4), (4, 6)),
                (Rule(bits=3, group_size=1, lut_dtype="int8"), (2, 12)),
                (Rule(bits=2, group_size=3, lut_dtype="int4"), (6, 8)),
            ]
        ):
            weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            centroids, _ = seed_centroids(weight, rule)
            found.append(Clusters(weight, centroids, rule, ClusterMethod(), in_bfloat16=in_bfloat16))
        return found

    together, each = make(), make()
    batch = ClusterBatch(together)
    for clusters in (together, each):
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW([p for c in clusters for p in c.parameters()], lr=0.1)
        for _ in range(2):
            for own in clusters:
                PalettizedLinear(own, None)(torch.randn(3, own.weight.shape[1])).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if clusters is together:
                batch.refresh()
                assert not any(own.is_stale for own in together)
    for a, b in zip(together, each, strict=True):
        assert int(a.moved) > 0
        assert a.export("w").same_bits(b.export("w"))
        assert torch.equal(a.table(torch.bfloat16), b.table(torch.bfloat16))
