"""The CUDA kernels against the CPU's."""

from __future__ import annotations

import pytest
import torch

from edkm_export.training.palettized import tables

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "m", "k"), [(3, 5000, 8), (1, 100_003, 256), (70, 33, 2), (36, 9216, 16)])
def test_kernels(groups: int, m: int, k: int, dtype: torch.dtype) -> None:
    assert torch.cuda.is_available() and tables._triton() is not None
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(groups, m, generator=generator)
    centroids = torch.randn(groups, k, generator=generator)
    indices = torch.randint(0, k, (groups, m), dtype=torch.uint8, generator=generator)
    moved = torch.zeros(1, dtype=torch.int32)
    on_gpu = [each.cuda() for each in (weight, centroids, indices, moved)]
    tables.assign(weight, centroids, indices, moved)
    tables.assign(*on_gpu)
    nearest = (weight - tables.look_up(centroids, indices)).abs()
    found = (weight - tables.look_up(centroids, on_gpu[2].cpu())).abs()
    assert torch.equal(found, nearest)  # ties may be told apart by the last digit of a border
    assert abs(int(on_gpu[3]) - int(moved)) <= int((on_gpu[2].cpu() != indices).sum())
    table, values = centroids.to(dtype), weight.to(dtype)
    assert torch.equal(tables.look_up(table.cuda(), indices.cuda()).cpu(), tables.look_up(table, indices))
    sums = tables.segment_sums(values.cuda(), indices.cuda(), k).cpu()
    # float32 sums of up to 13,000 values of unit size, in another order
    torch.testing.assert_close(sums, tables.segment_sums(values, indices, k), rtol=1e-4, atol=1e-2)
    assert torch.equal(tables.use_counts(indices.cuda(), k).cpu(), tables.use_counts(indices, k))
