from __future__ import annotations

import pytest
import torch

from edkm_export.clustering import patterns
from edkm_export.clustering.patterns import HostPatterns, Patterns


def padded(table, values, width):
    """A table in the order of the patterns, padded to a width."""
    assert table.shape == values.shape and table.shape[1] <= width
    return torch.nn.functional.pad(table, (0, width - table.shape[1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("groups", "m"), [(1, 100_000), (3, 5000), (40, 17)])
@pytest.mark.parametrize("kind", [HostPatterns, Patterns])
def test_tables_are_those_of_unique(kind, dtype, groups, m, monkeypatch):
    monkeypatch.setattr(patterns, "_DEVICE_BLOCK", 7000)
    torch.manual_seed(0)
    weight = (torch.randn(groups, m) * 0.1).to(dtype)
    weight[:, :5] = torch.tensor([0.0, -0.0, -0.0, 65504.0, -1e-7]).to(dtype)
    grad = torch.randn(groups, m).to(dtype)
    table = kind(weight, torch.float64)
    sums = table.sums(grad)
    factor, term = torch.randn_like(table.values), torch.randn_like(table.values)
    out, soft = torch.empty(groups, m, dtype=dtype), torch.empty(groups, m, dtype=dtype)
    table.combine(grad, factor, term, out)
    table.look_up(term, soft)
    for group in range(groups):
        bits = weight[group].view(torch.int16).int() & 0xFFFF
        used, index, counts = torch.unique(bits, return_inverse=True, return_counts=True)
        size = len(used)
        assert torch.equal(table.values[group, :size], used.to(torch.int16).view(dtype).double())
        assert torch.equal(table.counts[group, :size], counts.double())
        assert bool((table.counts[group, size:] == 0).all()) and bool((sums[group, size:] == 0).all())
        expected = torch.zeros(size).double().index_add_(0, index, grad[group].double())
        # Sums of at most 100,000 terms of size 1 in another order.
        torch.testing.assert_close(sums[group, :size], expected, rtol=1e-12, atol=1e-10)
        assert torch.equal(soft[group], term[group][index].to(dtype))
        exact = (grad[group].double() * factor[group][index] + term[group][index]).to(dtype)
        assert torch.equal(out[group], exact)


@pytest.mark.parametrize("threads", [1, 3])
def test_parts_of_a_group_add_up(threads):
    weight = torch.randn(1, 100_001).bfloat16()
    grad = torch.randn(1, 100_001).bfloat16()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        table = HostPatterns(weight, torch.float64)
        sums = table.sums(grad)
    finally:
        torch.set_num_threads(before)
    assert float(table.counts.sum()) == 100_001
    torch.testing.assert_close(sums.sum(), grad.double().sum(), rtol=1e-12, atol=1e-9)
