"""Caches of int8: what is read of them, and a model that reads an artifact's."""

from __future__ import annotations

import pytest
import torch

from edkm_export.decoder.int8_states import from_int8, to_int8
from edkm_export.errors import PackageError
from edkm_export.kv_cache import LEAST_SCALE, HeldLayer
from edkm_export.reference.caching import new_cache, run_cached
from edkm_export.reference.int8_cache import Misfit, held_cache, through_int8
from tests.helpers.odd_models import build

X = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0)) * 10
MODEL = build("plain").eval().requires_grad_(False)
TOKENS = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(1))


def expected(numbers: list[float]) -> tuple[list[int], float]:
    """Codes and scale of one head and token, in double precision."""
    scale = max(max(map(abs, numbers)) / 127, LEAST_SCALE)
    return [round(number / scale) for number in numbers], scale  # Python, too, rounds ties to even


def test_a_scale_for_each_head_and_token():
    codes, scales = to_int8(X)
    assert codes.dtype == torch.int8 and codes.shape == X.shape and scales.shape == (2, 3, 5, 1)
    for place in torch.cartesian_prod(*map(torch.arange, X.shape[:3])).tolist():
        row, head, token = place
        wanted, scale = expected(X[row, head, token].double().tolist())
        assert codes[row, head, token].tolist() == wanted
        assert float(scales[row, head, token]) == pytest.approx(scale, rel=1e-6)
    assert int(codes.abs().amax(-1).min()) == 127  # the largest of each is exact


def test_exporter_and_reference_agree():
    """They share no code, and round alike."""
    torch.testing.assert_close(from_int8(*to_int8(X)), through_int8(X), rtol=0, atol=0)


def test_no_number_is_off_by_more_than_half_a_step():
    codes, scales = to_int8(X)
    assert bool(((from_int8(codes, scales) - X).abs() <= scales * 0.5001).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads_of_almost_nothing(dtype):
    """Zeros stay zeros, and no scale falls below the normal numbers of float16."""
    tiny = torch.tensor([[[[0.0] * 4, [1e-7, 0, 0, 0], [60000.0, 1, -60000, 0]]]], dtype=dtype)
    codes, scales = to_int8(tiny)
    assert scales[0, 0, :2, 0].tolist() == [LEAST_SCALE] * 2
    assert codes[0, 0, :2].abs().max() == 0 and codes[0, 0, 2].tolist() == [127, 0, -127, 0]
    assert bool(torch.isfinite(from_int8(codes, scales)).all())


def test_newest_tokens_are_read_from_it_too():
    """So that a text is read alike at once and token by token, and nothing else of it."""
    whole = run_cached(MODEL, TOKENS, new_cache(MODEL, "int8"))
    cache = new_cache(MODEL, "int8")
    parts = torch.cat([run_cached(MODEL, token, cache) for token in TOKENS.split(1, 1)], 1)
    floats = run_cached(MODEL, TOKENS, new_cache(MODEL))
    # No code of this small model falls to the other side; it is the same sums in another order.
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    assert (whole - floats).abs().max() > 1e-4  # int8 is not the same as floats


def held(change=lambda layer: layer) -> list[HeldLayer]:
    """What a model's own floats become."""
    cache = new_cache(MODEL)
    run_cached(MODEL, TOKENS, cache)
    return [
        change(HeldLayer(*(part[0] for each in (layer.keys, layer.values) for part in to_int8(each))))
        for layer in cache.layers
    ]


def test_a_model_reads_what_it_is_given():
    # of floats that went through nothing: the first layer is right to rounding, later ones saw other activations
    layers, misfit = held()[:1], Misfit()
    with pytest.raises(PackageError, match="holds no keys and values of layer 1"):
        run_cached(MODEL, TOKENS, held_cache(MODEL, layers, misfit))
    assert misfit.steps <= 0.501 and misfit.scale < 1e-5 and misfit.codes == 2 * layers[0].keys.numel()


FAULTS = {
    "a scale twice too large": lambda layer: HeldLayer(
        layer.keys, layer.key_scales * 2, layer.values, layer.value_scales
    ),
    "scales of keys and values exchanged": lambda layer: HeldLayer(
        layer.keys, layer.value_scales, layer.values, layer.key_scales
    ),
    "keys and values exchanged": lambda layer: HeldLayer(
        layer.values, layer.value_scales, layer.keys, layer.key_scales
    ),
    "a token off": lambda layer: HeldLayer(
        layer.keys.roll(1, 1), layer.key_scales.roll(1, 1), layer.values, layer.value_scales
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_held_wrongly_shows(fault):
    misfit = Misfit()
    run_cached(MODEL, TOKENS, held_cache(MODEL, held(FAULTS[fault]), misfit))
    assert misfit.scale > 0.1 or misfit.steps > 5  # 2e-3 and 0.75 are allowed in float32


def test_other_shapes_are_refused():
    fewer = held(
        lambda layer: HeldLayer(layer.keys[:1], layer.key_scales[:1], layer.values, layer.value_scales)
    )
    with pytest.raises(PackageError, match=r"layer 0: the artifact holds codes \[1, "):
        run_cached(MODEL, TOKENS, held_cache(MODEL, fewer, Misfit()))
