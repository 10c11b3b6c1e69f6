"""Every op on random shapes, axes, dtypes and modes against numpy."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch

from converters.coreml.read.ops import known_ops
from tests.helpers import (  # noqa: F401  (importing registers the draws)
    mil_draws_elementwise,
    mil_draws_images,
    mil_draws_layers,
    mil_draws_structure,
)
from tests.helpers.mil_draws import DRAWS, expected_arrays, run_drawn

CASES = 50


def _generator(op: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(op.encode()))


@pytest.mark.parametrize("op", sorted(DRAWS))
def test_drawn(op: str) -> None:
    rng = _generator(op)
    for number in range(CASES):
        drawn = DRAWS[op](rng, op)
        found = run_drawn(op, drawn)
        wanted = expected_arrays(drawn)
        assert len(found) == len(wanted)
        for actual, expected in zip(found, wanted, strict=True):
            where = f"case {number}: {drawn}"
            assert isinstance(actual, torch.Tensor) and tuple(actual.shape) == expected.shape, where
            if expected.dtype.kind != "f":
                np.testing.assert_array_equal(actual.numpy(), expected, where)
                continue
            finite = np.abs(expected[np.isfinite(expected)])
            scale = float(finite.max()) if finite.size else 0.0
            np.testing.assert_allclose(
                actual.numpy(), expected, rtol=drawn.tolerance, atol=drawn.tolerance * scale, err_msg=where
            )


# Drawn in test_mil_lists.py, for they take more than arrays.
ELSEWHERE = {
    "classify",
    "cond",
    "while_loop",
    "make_list",
    "list_gather",
    "list_length",
    "list_read",
    "list_scatter",
    "list_write",
    "random_bernoulli",
    "random_categorical",
    "random_normal",
    "random_uniform",
    "read_state",
    "write_state",
    "coreml_update_state",
}


def test_every_op_is_drawn() -> None:
    compressed = {name for name in known_ops() if name.startswith("constexpr_")}
    assert set(known_ops()) == DRAWS.keys() | ELSEWHERE | compressed
