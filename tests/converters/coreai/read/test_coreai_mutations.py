"""Mutated Core AI models: each is refused with one typed error, or gives back what was written."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from converters.coreai.read.asset import load_asset
from converters.coreai.read.program import read_program
from converters.coreai.read.weights import read_dense, read_palettes
from edkm_export import checkpoint
from edkm_export.errors import PackageError
from tests.helpers.paths import FIXTURES

FOLDER = FIXTURES / "coreai"


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """One damage: a flipped bit, another byte, a lost or doubled stretch, an end."""
    place, kind = rng.randrange(len(raw)), rng.randrange(6)
    if kind == 0:
        return raw[:place]
    if kind == 1:
        return raw[:place] + raw[place + rng.randrange(1, 9) :]
    if kind == 2:
        stop = min(place + rng.randrange(1, 9), len(raw))
        return raw[:stop] + raw[place:]
    changed = bytearray(raw)
    changed[place] = changed[place] ^ 1 << rng.randrange(8) if kind < 5 else rng.randrange(256)
    return bytes(changed)


@pytest.fixture(scope="module")
def written():
    return checkpoint.load(FOLDER / "model.pt")


def outcome(raw: bytes, description, written) -> str:
    """The hash is no help here: a program with a hash of its own is read all the same."""
    try:
        program = read_program(memoryview(raw))
        palettized, dense = read_palettes(program, description), read_dense(program, description)
        for function in program.functions.values():
            function.op_counts()
            list(function.constants())
    except PackageError as error:
        assert "\n" not in str(error)
        return "refused"
    for name, tensor in written.palettized.items():
        assert palettized[name].same_bits(tensor), name
    for name, tensor in written.dense.items():
        assert dense[name].equal(tensor.half()), name
    return "equal"


@pytest.mark.parametrize("mutants", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutants(mutants, written):
    rng = random.Random(0)
    raw = (FOLDER / "model.aimodel" / "main.mlirb").read_bytes()
    description = load_asset(FOLDER / "model.aimodel").description
    assert outcome(raw, description, written) == "equal"
    found = [outcome(mutated(raw, rng), description, written) for _ in range(mutants)]
    assert found.count("refused") > mutants / 2 and found.count("equal") > 0


def test_counts_that_no_file_can_hold():
    """A header that promises billions of things is refused before any memory is asked for."""
    raw = bytearray((FOLDER / "model.aimodel" / "main.mlirb").read_bytes())
    for place in range(8, 400, 8):
        changed = bytearray(raw)
        changed[place : place + 9] = b"\0" + b"\xff" * 8
        try:
            read_program(memoryview(bytes(changed)))
        except PackageError:
            continue


def test_a_hostile_file_is_read_by_its_path_alone(tmp_path):
    link = tmp_path / "model.aimodel"
    link.symlink_to(FOLDER / "model.aimodel")
    assert load_asset(Path(link)).palettized()
