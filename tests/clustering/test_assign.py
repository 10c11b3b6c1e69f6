from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edkm_export.clustering import assign, hard_assign
from edkm_export.errors import PaletteError

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
grid = st.integers(-12, 12).map(lambda value: value / 8)  # ties in plenty, all exact


def reference(weight: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """First index of the least distance; exact on the grid."""
    if weight.dim() == 2:
        weight, centroids = weight[..., None], centroids[..., None]
    distance = (weight.double()[:, :, None] - centroids.double()[:, None]).square().sum(-1)
    return distance.argmin(2).to(torch.uint8)


@settings(max_examples=200, deadline=None)
@given(
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    groups=st.integers(1, 3),
    m=st.integers(1, 12),
    k=st.integers(1, 9),
    dim=st.integers(0, 3),
    data=st.data(),
)
def test_nearest_centroid_and_lowest_index(dtypes, groups, m, k, dim, data):
    tail = (dim,) if dim else ()
    size = max(dim, 1)

    def draw(rows: int, dtype: torch.dtype) -> torch.Tensor:
        flat = data.draw(st.lists(grid, min_size=groups * rows * size, max_size=groups * rows * size))
        return torch.tensor(flat, dtype=dtype).view(groups, rows, *tail)

    weight, centroids = draw(m, dtypes[0]), draw(k, dtypes[1])
    found = hard_assign(weight, centroids)
    assert found.dtype == torch.uint8 and torch.equal(found, reference(weight, centroids))


@pytest.mark.parametrize("k", [2, 3, 8, 16])
def test_float32_weights_beside_borders_that_float32_cannot_hold(k):
    torch.manual_seed(0)
    centroids = torch.randn(2, k)
    ordered = centroids.double().sort(1).values
    border = ((ordered[:, 1:] + ordered[:, :-1]) / 2).float()
    up, down = border.nextafter(torch.tensor(torch.inf)), border.nextafter(torch.tensor(-torch.inf))
    weight = torch.cat([border, up, down, torch.randn(2, 5000)], dim=1)  # more than one block of the cache
    assert torch.equal(hard_assign(weight, centroids), reference(weight, centroids))


@pytest.mark.parametrize("shape", [(3, 1000), (3, 1000, 2), (50, 7), (50, 7, 4)])
def test_blocks_do_not_matter(shape, monkeypatch):
    torch.manual_seed(0)
    weight, centroids = torch.randn(shape), torch.randn(shape[0], 256, *shape[2:])
    whole = hard_assign(weight, centroids)
    monkeypatch.setattr(assign, "_BLOCK", 300)
    assert torch.equal(hard_assign(weight, centroids), whole)
    assert torch.equal(whole, reference(weight, centroids))
    assert int(whole.max()) > 200


def test_a_view_is_as_good_as_a_copy():
    torch.manual_seed(0)
    weight, centroids = torch.randn(40, 6).T, torch.randn(5, 6).T
    assert torch.equal(hard_assign(weight, centroids), reference(weight, centroids))


@pytest.mark.parametrize(
    ("weight", "centroids", "message"),
    [
        (torch.zeros(4), torch.zeros(2), "do not fit"),
        (torch.zeros(2, 4), torch.zeros(3, 2), "do not fit"),
        (torch.zeros(2, 4, 2), torch.zeros(2, 3, 3), "vectors of 2"),
        (torch.zeros(1, 4), torch.zeros(1, 257), "257 centroids"),
        (torch.tensor([[0.0], [torch.nan]]), torch.zeros(2, 2), "weight: group 1 of 2"),
        (torch.zeros(2, 2), torch.tensor([[torch.inf], [0.0]]), "centroids: group 0 of 2"),
    ],
)
def test_bad_input_is_refused(weight, centroids, message):
    with pytest.raises(PaletteError, match=message):
        hard_assign(weight, centroids)
