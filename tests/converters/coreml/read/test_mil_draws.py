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
from tests.helpers.mil_draws import DRAWS, expected_arrays, in_float16, run_drawn

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


# One step of float16 decides on another whole number, or on one element more.
UNSTEADY = {"floor", "ceil", "round", "floor_div", "mod", "range_1d"}


@pytest.mark.parametrize("op", sorted(DRAWS.keys() - UNSTEADY))
def test_drawn_in_float16(op: str) -> None:
    """The same cases with inputs, constants and outputs in float16: each op runs, and is as close as float16 is."""
    rng = _generator(op)
    for number in range(10):
        drawn = DRAWS[op](rng, op)
        for precision in ("float16", "rounded"):
            for actual, wanted in zip(
                run_drawn(op, in_float16(drawn), precision), expected_arrays(drawn), strict=True
            ):
                assert tuple(actual.shape) == wanted.shape
                if wanted.dtype.kind != "f":
                    continue
                assert actual.dtype == (torch.float16 if precision == "float16" else torch.float32)
                known = np.isfinite(wanted)
                scale = float(np.abs(wanted[known]).max()) if known.any() else 0.0
                # inputs of size 1 to 10 are rounded to 2**-11, and the steepest ops (tan, pow) make ten times that
                np.testing.assert_allclose(
                    actual.float().numpy()[known],
                    wanted[known],
                    rtol=0.02,
                    atol=0.02 * scale + 1e-3,
                    err_msg=f"case {number}, {precision}: {drawn}",
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
