"""The table of LUT dtypes against numpy, and against what palettization makes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

from edkm_export.lut_dtypes import LUT_DTYPE_NAMES, LUT_DTYPES, stored_as
from edkm_export.lut_grid import check_bits, suited
from edkm_export.packing import SUPPORTED_BITS
from edkm_export.palettization import palettize_weight
from edkm_export.recipe import Rule
from tests.helpers.paths import ROOT


def test_names_and_storage():
    assert tuple(LUT_DTYPES) == LUT_DTYPE_NAMES == ("float16", "int8", "int4")
    for name, form in LUT_DTYPES.items():
        assert form.name == name
        assert form.storage_bits == np.dtype(form.storage_name).itemsize * 8
        assert torch.empty(1, dtype=form.storage).element_size() * 8 == form.storage_bits
    assert stored_as(torch.int8) is LUT_DTYPES["int8"] and stored_as(torch.float32) is None


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LUT_DTYPES["int4"].max_bits = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        LUT_DTYPES["int2"] = LUT_DTYPES["int4"]  # type: ignore[index]


def test_ranges():
    """Of two's complement; the levels of int8 are symmetric."""
    assert LUT_DTYPES["int8"].valid == (np.iinfo(np.int8).min, np.iinfo(np.int8).max)
    assert LUT_DTYPES["int8"].levels == (-127, 127)
    assert LUT_DTYPES["int4"].valid == LUT_DTYPES["int4"].levels == (-(2**3), 2**3 - 1)


@pytest.mark.parametrize(
    ("entries", "held"), [([-8, 7], True), ([-9, 0], False), ([0, 8], False), ([], True)]
)
def test_what_int4_holds(entries, held):
    lut = torch.tensor(entries, dtype=torch.int8)
    assert LUT_DTYPES["int4"].holds(lut) is held
    assert LUT_DTYPES["int8"].holds(lut) and not LUT_DTYPES["float16"].holds(lut)


@pytest.mark.parametrize("name", LUT_DTYPE_NAMES)
def test_a_palettized_weight_is_of_the_dtype_that_its_rule_names(name):
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    for bits in (bits for bits in SUPPORTED_BITS if bits <= min(LUT_DTYPES[name].max_bits, 4)):
        made = palettize_weight("w", weight, Rule(bits=bits, group_size=8, lut_dtype=name))
        form = LUT_DTYPES[name]
        assert made.lut_dtype == name and form.holds(made.lut)
        assert (made.lut_scale is not None) == form.scaled
        luts = made.size_bytes - made.indices.numel()
        assert luts * 8 == 2 * form.lut_bits(bits)  # two groups of 8 rows


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("name", LUT_DTYPE_NAMES)
def test_bits_of_an_index(name, bits):
    if bits <= LUT_DTYPES[name].max_bits:
        check_bits(name, bits)
        assert suited(name, bits) == name
    else:
        with pytest.raises(ValueError, match=f"{name} has .* levels, so that with indices of {bits} bits"):
            check_bits(name, bits)
        assert suited(name, bits) == "int8"


def test_importing_the_table_does_not_import_torch():
    code = "import sys, edkm_export.lut_dtypes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
