"""Faults in the bytes of weight.bin."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edkm_export.checkpoint import Checkpoint
from tests.faults.coreml_program import Program, bound, input_length, read
from tests.faults.mutation import Q, rope_tables_of


def stored(checkpoint: Checkpoint, name: str, part: str) -> bytes:
    """A parameter as it must lie in weight.bin; part is "lut", "indices" or "dense"."""
    if part == "dense":
        return checkpoint.dense[name].half().numpy().tobytes()
    return getattr(checkpoint.palettized[name], part).numpy().tobytes()


def edit_blob(needle: Callable[[Checkpoint], bytes], change: Callable[[bytearray], None]) -> Any:
    """Change the bytes of one blob."""

    def apply(package: Path, checkpoint: Checkpoint) -> None:
        (path,) = package.rglob("weight.bin")
        data, known = bytearray(path.read_bytes()), needle(checkpoint)
        assert data.count(known) == 1
        start = data.index(known)
        blob = bytearray(known)
        change(blob)
        assert len(blob) == len(known) and blob != known
        data[start : start + len(blob)] = blob
        path.write_bytes(data)

    return apply


def part(name: str, which: str) -> Callable[[Checkpoint], bytes]:
    return lambda checkpoint: stored(checkpoint, name, which)


def halves(change: Callable[[Any], None]) -> Callable[[bytearray], None]:
    """A change of the blob seen as float16."""

    def apply(blob: bytearray) -> None:
        values = np.frombuffer(bytes(blob), np.float16).copy()
        change(values)
        blob[:] = values.tobytes()

    return apply


def flip(place: int, mask: int) -> Callable[[bytearray], None]:
    def change(blob: bytearray) -> None:
        blob[place] ^= mask

    return change


def swap_groups(values: Any) -> None:
    """Exchange the first two LUTs of a weight with 16 entries in each."""
    values[:16], values[16:32] = values[16:32].copy(), values[:16].copy()


def set_value(place: int, value: float) -> Callable[[Any], None]:
    def change(values: Any) -> None:
        values[place] = value

    return change


def scale(factor: float) -> Callable[[Any], None]:
    def change(values: Any) -> None:
        values *= np.float16(factor)

    return change


def rope_base(package: Path, checkpoint: Checkpoint) -> None:
    """Write the tables of another base in the place of the right ones."""
    (path,) = package.rglob("weight.bin")
    data = bytearray(path.read_bytes())
    length = input_length(read(package))
    wrong = rope_tables_of(checkpoint, length, rope_theta=500.0)
    for right, other in zip(rope_tables_of(checkpoint, length), wrong, strict=True):
        known = right.half().numpy().tobytes()
        assert data.count(known) == 1
        start = data.index(known)
        data[start : start + len(known)] = other.half().numpy().tobytes()
    path.write_bytes(data)


def shifted_positions(package: Path, checkpoint: Checkpoint) -> None:
    """Let queries and keys of one head size stand one position further: only the table of the sines is moved."""
    (path,) = package.rglob("weight.bin")
    data = bytearray(path.read_bytes())
    _, sin = rope_tables_of(checkpoint, input_length(read(package)))
    known = sin.half().numpy().tobytes()
    start = data.index(known)
    data[start : start + len(known)] = sin.half().roll(1, 0).numpy().tobytes()
    path.write_bytes(data)


def open_mask(package: Path, _checkpoint: Checkpoint) -> None:
    """Let every position see what follows it."""
    (path,) = package.rglob("weight.bin")
    data = bytearray(path.read_bytes())
    program = Program(read(package))
    mask = program.maker(bound(program.ops("scaled_dot_product_attention")[0], "attn_mask"))
    record = mask.attributes["val"].blobFileValue.offset
    sentinel, _, size, start, _ = struct.unpack_from("<IIQQQ", data, record)
    assert sentinel == 0xDEADBEEF and any(data[start : start + size])
    data[start : start + size] = bytes(size)
    path.write_bytes(data)


def swap_blobs(first: str, second: str) -> Any:
    def apply(package: Path, checkpoint: Checkpoint) -> None:
        (path,) = package.rglob("weight.bin")
        data = bytearray(path.read_bytes())
        one, other = (stored(checkpoint, name, "indices") for name in (first, second))
        places = data.index(one), data.index(other)
        data[places[0] : places[0] + len(one)], data[places[1] : places[1] + len(other)] = other, one
        path.write_bytes(data)

    return apply


def truncate(package: Path, _checkpoint: Checkpoint) -> None:
    (path,) = package.rglob("weight.bin")
    path.write_bytes(path.read_bytes()[:-64])


def record_field(which: int, value: int) -> Any:
    """Change a field of the record in front of a LUT: sentinel, dtype, size, offset, padding."""

    def apply(package: Path, checkpoint: Checkpoint) -> None:
        (path,) = package.rglob("weight.bin")
        data = bytearray(path.read_bytes())
        start = data.index(stored(checkpoint, Q, "lut")) - 64
        fields = list(struct.unpack_from("<IIQQQ", data, start))
        fields[which] = value if which != 3 else fields[3] + value
        struct.pack_into("<IIQQQ", data, start, *fields)
        path.write_bytes(data)

    return apply
