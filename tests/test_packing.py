from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edkm_export import packing
from edkm_export.errors import PaletteError
from edkm_export.packing import SUPPORTED_BITS, pack, packed_size_bytes, padding_bits, unpack
from tests.helpers.palettes import numpy_pack


@st.composite
def values_and_bits(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    n_bits = draw(st.sampled_from(SUPPORTED_BITS))
    values = draw(st.lists(st.integers(0, (1 << n_bits) - 1), max_size=70))
    return np.array(values, dtype=np.uint8), n_bits


def test_supported_bits_are_those_that_a_target_can_hold():
    assert SUPPORTED_BITS == (1, 2, 3, 4, 6, 8)


@settings(max_examples=300, deadline=None)
@given(case=values_and_bits(), block=st.integers(1, 5))
def test_stream_is_that_of_packbits_at_every_block_size(case, block):
    values, n_bits = case
    expected = numpy_pack(values, n_bits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_BLOCK", block)  # in units of whole bytes, so 70 values span many blocks
        stream = pack(torch.from_numpy(values), n_bits)
        back = unpack(stream, n_bits, len(values))
    assert stream.dtype == torch.uint8 and np.array_equal(stream.numpy(), expected)
    assert back.dtype == torch.uint8 and np.array_equal(back.numpy(), values)
    assert packed_size_bytes(len(values), n_bits) == len(expected)
    assert padding_bits(len(values), n_bits) == len(expected) * 8 - len(values) * n_bits


@pytest.mark.parametrize("n_bits", SUPPORTED_BITS)
def test_default_block_border(n_bits, monkeypatch):
    monkeypatch.setattr(packing, "_BLOCK", 1 << 10)
    values = np.random.default_rng(n_bits).integers(0, 1 << n_bits, 3 * 8 * (1 << 10) + 5, dtype=np.uint8)
    stream = pack(torch.from_numpy(values), n_bits)
    assert np.array_equal(stream.numpy(), numpy_pack(values, n_bits))
    assert np.array_equal(unpack(stream, n_bits, len(values)).numpy(), values)


@pytest.mark.parametrize("n_bits", SUPPORTED_BITS)
def test_shape_and_strides_are_row_major(n_bits):
    values = (torch.arange(12).view(3, 4) % (1 << n_bits)).byte()
    transposed = values.t()
    assert torch.equal(pack(values, n_bits), pack(values.flatten(), n_bits))
    assert torch.equal(pack(transposed, n_bits), pack(transposed.contiguous(), n_bits))


def test_eight_bits_do_not_share_memory():
    values = torch.tensor([1, 2, 255], dtype=torch.uint8)
    stream = pack(values, 8)
    stream[0] = 9
    back = unpack(stream, 8, 3)
    back[1] = 9
    assert values.tolist() == [1, 2, 255] and stream.tolist() == [9, 2, 255]


@pytest.mark.parametrize("n_bits", SUPPORTED_BITS)
def test_padding_bits_that_are_set_are_refused(n_bits):
    tried = 0
    for count in range(1, 9):
        stream = pack(torch.zeros(count, dtype=torch.uint8), n_bits)
        pad = padding_bits(count, n_bits)
        for bit in range(8 - pad, 8):
            damaged = stream.clone()
            damaged[-1] |= 1 << bit
            with pytest.raises(PaletteError, match=f"the {pad} padding bits.* not zero: it is damaged"):
                unpack(damaged, n_bits, count)
            tried += 1
    assert (tried > 0) == (n_bits != 8)  # only bytes have no padding


@pytest.mark.parametrize("n_bits", [1, 2, 3, 4, 6])
def test_value_beyond_the_lut_is_refused(n_bits):
    entries = 1 << n_bits
    pack(torch.tensor([entries - 1], dtype=torch.uint8), n_bits)
    with pytest.raises(
        PaletteError, match=f"index {entries} is beyond the {entries} entries of a {n_bits}-bit LUT"
    ):
        pack(torch.tensor([0, entries, 1], dtype=torch.uint8), n_bits)


@pytest.mark.parametrize("n_bits", [-1, 0, 5, 7, 9, 16])
def test_other_widths_are_refused(n_bits):
    values = torch.zeros(8, dtype=torch.uint8)
    for call in (
        lambda: pack(values, n_bits),
        lambda: unpack(values, n_bits, 8),
        lambda: packed_size_bytes(8, n_bits),
        lambda: padding_bits(8, n_bits),
    ):
        with pytest.raises(PaletteError, match=f"n_bits is {n_bits}; .* Use one of 1, 2, 3, 4, 6, 8"):
            call()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32, torch.bool])
def test_values_of_another_dtype_are_refused(dtype):
    with pytest.raises(PaletteError, match="expected torch.uint8"):
        pack(torch.zeros(4, dtype=dtype), 2)


@pytest.mark.parametrize(
    "stream",
    [
        torch.zeros(2, dtype=torch.uint8),
        torch.zeros(4, dtype=torch.uint8),
        torch.zeros(3, dtype=torch.int8),
        torch.zeros(1, 3, dtype=torch.uint8),
    ],
    ids=["short", "long", "dtype", "rank"],
)
def test_stream_of_another_size_or_dtype_is_refused(stream):
    with pytest.raises(PaletteError, match="8 3-bit indices takes 3 bytes of uint8"):
        unpack(stream, 3, 8)
