from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

from edkm_export import palette
from edkm_export.errors import PaletteError
from edkm_export.packing import SUPPORTED_BITS
from edkm_export.palette import PalettizedTensor, check_grouping
from tests.helpers.palettes import numpy_decode, numpy_unpack, random_palette

FORMS: dict[str, dict[str, Any]] = {
    **{f"{n_bits}_bits": {"shape": (12, 10), "n_bits": n_bits} for n_bits in SUPPORTED_BITS},
    "odd_sizes": {"shape": (5, 7), "n_bits": 3},
    "one_row": {"shape": (1, 9), "n_bits": 2},
    "one_column": {"shape": (9, 1), "n_bits": 6},
    "groups_out": {"shape": (12, 10), "n_bits": 3, "groups": (4, 1)},
    "groups_in": {"shape": (12, 10), "n_bits": 4, "groups": (1, 5)},
    "groups_both": {"shape": (12, 10), "n_bits": 2, "groups": (3, 2)},
    "a_lut_a_row": {"shape": (5, 7), "n_bits": 1, "groups": (5, 1)},
    "a_lut_a_weight": {"shape": (5, 7), "n_bits": 1, "groups": (5, 7)},
    "vectors_2": {"shape": (12, 10), "n_bits": 4, "dim": 2},
    "vectors_4": {"shape": (12, 10), "n_bits": 6, "dim": 4},
    "vectors_in_groups": {"shape": (24, 10), "n_bits": 3, "groups": (3, 2), "dim": 4},
    "int8": {"shape": (12, 10), "n_bits": 4, "int8": True},
    "int8_in_groups": {"shape": (12, 10), "n_bits": 4, "groups": (4, 5), "int8": True},
    "int8_vectors": {"shape": (12, 10), "n_bits": 3, "groups": (3, 1), "dim": 2, "int8": True},
    "conv_1x1": {"shape": (12, 10, 1, 1), "n_bits": 4, "groups": (3, 1)},
    "conv_3x3": {"shape": (6, 4, 3, 3), "n_bits": 3, "groups": (2, 4)},
    "conv_1d_vectors": {"shape": (8, 3, 5), "n_bits": 4, "dim": 2},
}


@pytest.fixture(params=FORMS)
def tensor(request) -> PalettizedTensor:
    return random_palette(**FORMS[request.param])


def test_decode_is_that_of_numpy(tensor):
    dense = tensor.decode()
    assert dense.dtype == torch.float16 and tuple(dense.shape) == tensor.shape
    assert np.array_equal(dense.numpy().view(np.int16), numpy_decode(tensor).view(np.int16))


def test_unpacked_indices_are_those_of_numpy(tensor):
    rows, columns = tensor.shape[0] // tensor.dim, math.prod(tensor.shape[1:])
    indices = tensor.unpack_indices()
    assert indices.dtype == torch.uint8
    assert np.array_equal(
        indices.numpy().ravel(), numpy_unpack(tensor.indices.numpy(), tensor.n_bits, rows * columns)
    )


def test_decode_in_blocks_of_rows(tensor, monkeypatch):
    whole = tensor.decode()
    for rows in (1, 2, 5):
        monkeypatch.setattr(palette, "_DECODE_ROWS", rows)
        assert torch.equal(tensor.decode(), whole)


def test_used_centroids_are_the_distinct_indices_of_each_group(tensor):
    groups_out, groups_in = tensor.groups
    indices = tensor.unpack_indices()
    expected = [
        [len(block.unique()) for block in rows.chunk(groups_in, dim=1)]
        for rows in indices.chunk(groups_out, dim=0)
    ]
    assert tensor.used_centroids.tolist() == expected


def test_sizes(tensor):
    weights = math.prod(tensor.shape)
    index_bytes = math.ceil(weights // tensor.dim * tensor.n_bits / 8)
    entries = tensor.groups[0] * tensor.groups[1] * 2**tensor.n_bits * tensor.dim
    scales = tensor.groups[0] * tensor.groups[1]
    expected = index_bytes + (entries + scales * 2 if tensor.lut_scale is not None else entries * 2)
    assert tensor.size_bytes == expected
    assert tensor.numel == weights
    assert tensor.bits_per_weight == expected * 8 / weights
    assert tensor.group_size * tensor.groups[0] == tensor.shape[0]
    assert tensor.matrix_shape == (tensor.shape[0], weights // tensor.shape[0])
    assert tensor.index_shape == (tensor.shape[0] // tensor.dim, weights // tensor.shape[0])


def test_int8_entries_are_rounded_once():
    lut = torch.tensor([3, -127], dtype=torch.int8).view(1, 1, 2, 1)
    scale = torch.tensor([[0.1]], dtype=torch.float16)
    tensor = PalettizedTensor.from_indices(
        "w", lut, torch.tensor([[0, 1]], dtype=torch.uint8), lut_scale=scale
    )
    exact = np.float32(np.float16(0.1))  # exact in float32: 11 bits times 7 bits
    assert tensor.decode().tolist() == [[float(np.float16(3 * exact)), float(np.float16(-127 * exact))]]


def test_unused_centroids_are_allowed():
    indices = torch.full((4, 4), 5, dtype=torch.uint8)
    tensor = PalettizedTensor.from_indices("w", torch.randn(1, 1, 256, 1).half(), indices)
    assert tensor.used_centroids.tolist() == [[1]]


def test_unsorted_luts_with_repeated_entries_are_allowed():
    lut = torch.tensor([2.0, -1.0, 2.0, 0.0]).half().view(1, 1, 4, 1)
    indices = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    assert PalettizedTensor.from_indices("w", lut, indices).decode().tolist() == [[2.0, -1.0, 2.0, 0.0]]


@pytest.mark.parametrize("n_bits", SUPPORTED_BITS)
def test_from_indices_finds_the_bits(n_bits):
    assert random_palette((4, 6), n_bits).n_bits == n_bits


def test_from_indices_takes_the_shape_of_the_indices():
    lut = torch.randn(1, 1, 4, 2).half()
    indices = torch.zeros(3, 5, 1, 1, dtype=torch.uint8)
    assert PalettizedTensor.from_indices("w", lut, indices).shape == (6, 5, 1, 1)


def test_from_indices_copies_views_of_a_training_graph():
    lut = torch.randn(4, 1, 1, 2).transpose(0, 2).half().requires_grad_()
    tensor = PalettizedTensor.from_indices("w", lut, torch.zeros(4, 4, dtype=torch.uint8))
    assert tensor.lut.is_contiguous() and not tensor.lut.requires_grad


# Validation, one fault at a time

GOOD = random_palette((8, 6), 3, (2, 3), name="good.weight")
GOOD_INT8 = random_palette((8, 6), 3, (2, 3), int8=True, name="good.weight")


def fields(tensor: PalettizedTensor, **changes: Any) -> dict[str, Any]:
    names = ("name", "shape", "n_bits", "lut", "indices", "lut_scale")
    return {name: getattr(tensor, name) for name in names} | changes


def changed(tensor: torch.Tensor, value: float) -> torch.Tensor:
    other = tensor.clone()
    other.view(-1)[-1] = value
    return other


def lut(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


FAULTS: dict[str, tuple[PalettizedTensor, dict[str, Any], str]] = {
    "5 bits": (GOOD, {"n_bits": 5}, "n_bits is 5, expected one of"),
    "7 bits": (GOOD, {"n_bits": 7}, "n_bits is 7, expected one of"),
    "0 bits": (GOOD, {"n_bits": 0}, "n_bits is 0, expected one of"),
    "rank 1": (GOOD, {"shape": (48,)}, "at least two positive sizes"),
    "empty": (GOOD, {"shape": (8, 0)}, "at least two positive sizes"),
    "negative": (GOOD, {"shape": (-8, -6)}, "at least two positive sizes"),
    "float sizes": (GOOD, {"shape": (8.0, 6)}, "at least two positive sizes"),
    "lut of rank 3": (
        GOOD,
        {"lut": lut(2, 3, 8)},
        "LUT has shape [2, 3, 8], expected [groups_out, groups_in, 8, dim]",
    ),
    "few entries": (GOOD, {"lut": lut(2, 3, 7, 1)}, "with fewer entries an index could point beyond the LUT"),
    "many entries": (GOOD, {"lut": lut(2, 3, 16, 1)}, "LUT has shape [2, 3, 16, 1]"),
    "no groups": (GOOD, {"lut": lut(0, 3, 8, 1)}, "LUT has shape [0, 3, 8, 1]"),
    "no values": (GOOD, {"lut": lut(2, 3, 8, 0)}, "LUT has shape [2, 3, 8, 0]"),
    "lut float32": (GOOD, {"lut": GOOD.lut.float()}, "LUT is torch.float32, expected float16 or int8"),
    "lut uint8": (GOOD, {"lut": lut(2, 3, 8, 1, dtype=torch.uint8)}, "LUT is torch.uint8"),
    "vectors": (GOOD, {"lut": lut(1, 1, 8, 3)}, "vectors of 3 do not divide its 8 output rows"),
    "groups out": (GOOD, {"lut": lut(3, 1, 8, 1)}, "3 groups do not divide its 8 index rows"),
    "groups out, vectors": (GOOD, {"lut": lut(8, 1, 8, 2)}, "8 groups do not divide its 4 index rows"),
    "groups in": (GOOD, {"lut": lut(2, 4, 8, 1)}, "4 groups do not divide its 6 columns"),
    "short indices": (
        GOOD,
        {"indices": GOOD.indices[:-1]},
        "indices are torch.uint8 [17], expected uint8 [18]",
    ),
    "long indices": (GOOD, {"indices": torch.zeros(19, dtype=torch.uint8)}, "[19], expected uint8 [18]"),
    "index dtype": (GOOD, {"indices": GOOD.indices.view(torch.int8)}, "indices are torch.int8"),
    "index rank": (GOOD, {"indices": GOOD.indices[None]}, "indices are torch.uint8 [1, 18]"),
    "nan": (GOOD, {"lut": changed(GOOD.lut, math.nan)}, "LUT holds NaN or infinity"),
    "infinity": (GOOD, {"lut": changed(GOOD.lut, -math.inf)}, "LUT holds NaN or infinity"),
    "scale of a float16 lut": (GOOD, {"lut_scale": GOOD_INT8.lut_scale}, "a float16 LUT takes no lut_scale"),
    "no scale": (GOOD_INT8, {"lut_scale": None}, "an int8 LUT needs a lut_scale"),
    "scale float32": (GOOD_INT8, {"lut_scale": torch.ones(2, 3)}, "lut_scale is torch.float32 [2, 3]"),
    "scale shape": (GOOD_INT8, {"lut_scale": torch.ones(2, 1).half()}, "expected float16 [2, 3]"),
    "scale nan": (
        GOOD_INT8,
        {"lut_scale": changed(torch.ones(2, 3).half(), math.nan)},
        "lut_scale holds NaN or infinity",
    ),
    "unknown lut_dtype": (
        GOOD,
        {"lut_dtype": "int3"},
        "lut_dtype is 'int3', expected one of float16, int8, int4",
    ),
    "lut_dtype of another type": (GOOD, {"lut_dtype": [8]}, "lut_dtype is [8], expected one of"),
    "lut_dtype of other entries": (
        GOOD,
        {"lut_dtype": "int8"},
        "LUT is torch.float16, but an int8 LUT is stored as int8",
    ),
    "int4 entry of 8": (
        GOOD_INT8,
        {"lut": changed(torch.zeros_like(GOOD_INT8.lut), 8), "lut_dtype": "int4"},
        "int4 LUT holds entries from 0 to 8, expected -8 to 7",
    ),
    "int4 entry of -9": (
        GOOD_INT8,
        {"lut": changed(torch.zeros_like(GOOD_INT8.lut), -9), "lut_dtype": "int4"},
        "int4 LUT holds entries from -9 to 0, expected -8 to 7",
    ),
    "scale overflow": (
        GOOD_INT8,
        {"lut": torch.full_like(GOOD_INT8.lut, 127), "lut_scale": torch.full((2, 3), 600.0).half()},
        "lut * lut_scale overflows float16",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_constructor_refuses(fault):
    tensor, changes, message = FAULTS[fault]
    PalettizedTensor(**fields(tensor))  # it is the change that is refused
    with pytest.raises(PaletteError, match=re.escape(message)) as caught:
        PalettizedTensor(**fields(tensor, **changes))
    assert str(caught.value).startswith("good.weight: ")


def test_from_indices_refuses_an_index_beyond_the_lut():
    with pytest.raises(PaletteError, match="good.weight: index 4 is beyond the 4 entries of a 2-bit LUT"):
        PalettizedTensor.from_indices(
            "good.weight", lut(1, 1, 4, 1), torch.full((2, 2), 4, dtype=torch.uint8)
        )


@pytest.mark.parametrize("entries", [3, 5, 32, 128, 257])
def test_from_indices_refuses_luts_of_other_sizes(entries):
    with pytest.raises(PaletteError):
        PalettizedTensor.from_indices("w", lut(1, 1, entries, 1), torch.zeros(2, 2, dtype=torch.uint8))


def test_from_indices_refuses_a_lut_of_another_rank():
    with pytest.raises(PaletteError, match="w: LUT has shape .*, expected four axes"):
        PalettizedTensor.from_indices("w", torch.zeros(4).half(), torch.zeros(2, 2, dtype=torch.uint8))


# LUT dtypes


def test_lut_dtype_is_that_of_the_entries_unless_it_is_given():
    assert GOOD.lut_dtype == "float16" and GOOD_INT8.lut_dtype == "int8"
    levels = torch.arange(8, dtype=torch.int8).view(1, 1, 8, 1) - 4
    indices, scale = torch.zeros(2, 2, dtype=torch.uint8), torch.ones(1, 1).half()
    made = PalettizedTensor.from_indices("w", levels, indices, lut_scale=scale, lut_dtype="int4")
    assert made.lut_dtype == "int4" and made.lut.dtype == torch.int8
    plain = PalettizedTensor.from_indices("w", levels, indices, lut_scale=scale)
    assert plain.lut_dtype == "int8"
    assert made.same_bits(plain) and plain.same_bits(made)  # exported formats store no mark
    assert made.size_bytes == plain.size_bytes == 2 + 8 + 2


def test_int4_takes_at_most_3_bits():
    lut = torch.zeros(1, 1, 16, 1, dtype=torch.int8)
    indices, scale = torch.zeros(2, 2, dtype=torch.uint8), torch.ones(1, 1).half()
    with pytest.raises(PaletteError, match="w: an int4 LUT takes indices of at most 3 bits, found 4"):
        PalettizedTensor.from_indices("w", lut, indices, lut_scale=scale, lut_dtype="int4")


# Bit equality


def test_same_bits_of_a_copy(tensor):
    copy = PalettizedTensor(
        **fields(tensor, name="other", lut=tensor.lut.clone(), indices=tensor.indices.clone())
    )
    assert tensor.same_bits(copy) and copy.same_bits(tensor)


def test_same_bits_tells_negative_zero_from_zero():
    zero, negative = changed(GOOD.lut, 0.0), changed(GOOD.lut, -0.0)
    a, b = PalettizedTensor(**fields(GOOD, lut=zero)), PalettizedTensor(**fields(GOOD, lut=negative))
    assert torch.equal(a.lut, b.lut)  # equal as numbers
    assert not a.same_bits(b) and not b.same_bits(a)


@pytest.mark.parametrize(
    ("tensor", "other"),
    [
        (GOOD, PalettizedTensor(**fields(GOOD, lut=changed(GOOD.lut, 1.0)))),
        (GOOD, PalettizedTensor(**fields(GOOD, indices=changed(GOOD.indices, int(GOOD.indices[-1]) ^ 1)))),
        (GOOD, PalettizedTensor(**fields(GOOD, shape=(8, 3, 2)))),
        (GOOD, random_palette((8, 6), 2, (2, 3))),
        (GOOD, GOOD_INT8),
        (GOOD_INT8, PalettizedTensor(**fields(GOOD_INT8, lut_scale=torch.ones(2, 3).half()))),
        (
            PalettizedTensor("w", (4, 4), 1, lut(2, 1, 2, 1), torch.zeros(2, dtype=torch.uint8)),
            PalettizedTensor("w", (4, 4), 1, lut(1, 2, 2, 1), torch.zeros(2, dtype=torch.uint8)),
        ),
    ],
    ids=["lut", "index", "shape", "bits", "dtype", "scale", "groups"],
)
def test_same_bits_sees_every_difference(tensor, other):
    assert not tensor.same_bits(other) and not other.same_bits(tensor)


# Grouping


def test_group_size_that_does_not_divide_lists_those_that_do():
    check_grouping("w", 1536, 16)
    check_grouping("w", 1536, 0)
    message = "w: group_size 20 does not divide its 1536 output rows; use 4, 8, 16, 32, 64 or 128."
    with pytest.raises(PaletteError, match=f"^{re.escape(message)}$"):
        check_grouping("w", 1536, 20)
    with pytest.raises(PaletteError, match=r"37 output rows; use 0 \(one LUT for the whole weight\)"):
        check_grouping("w", 37, 16)
    with pytest.raises(PaletteError, match="12 output rows; use 4"):
        check_grouping("w", 12, 16)
    with pytest.raises(PaletteError, match="group_size -8 is negative"):
        check_grouping("w", 16, -8)
