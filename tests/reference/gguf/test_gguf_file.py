"""The container: what it holds is what the `gguf` package's own reader finds, and damage is said in one line."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from edkm_export.errors import InputError, SourceError
from edkm_export.reference.gguf.gguf_file import GgufFile, part_paths
from tests.helpers.gguf_kinds import KINDS, QUANTIZED
from tests.helpers.gguf_writer import write


@pytest.fixture
def path(tmp_path) -> Path:
    kind = KINDS["llama, tied"]
    return kind.write(kind.model(), tmp_path)


@pytest.fixture
def parts(tmp_path) -> list[Path]:
    kind = KINDS["llama, split in three"]
    return part_paths(kind.write(kind.model(), tmp_path))


def test_as_the_reader_of_gguf(tmp_path):
    kind = QUANTIZED["Q4_1"]
    path = kind.write(kind.model(), tmp_path)
    found, expected = GgufFile.open(path), gguf.GGUFReader(path)
    keys = {name: each.contents() for name, each in expected.fields.items() if not name.startswith("GGUF.")}
    assert found.metadata == keys
    assert [*found.tensors] == [each.name for each in expected.tensors]
    for each in expected.tensors:
        mine = found.tensors[each.name]
        assert mine.kind == each.tensor_type.name and mine.shape == tuple(each.shape.tolist()[::-1])
        raw = np.ascontiguousarray(each.data).view(np.uint8).reshape(mine.rows, -1)
        assert np.array_equal(mine.raw(0, mine.rows), raw)


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        GgufFile.open(path)
    message = str(caught.value)
    assert message.startswith(f"{path.parent}/") and "\n" not in message
    return message


@pytest.mark.parametrize("kept", [0, 3, 4, 8, 20, 24, 60, 500, 4000, -40_000, -1])
def test_cut_file(path, kept):
    content = path.read_bytes()
    path.write_bytes(content[:kept])
    refused(path)


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "2**62 tensors": lambda content: content[:8] + struct.pack("<Q", 1 << 62) + content[16:],
    "2**62 keys": lambda content: content[:16] + struct.pack("<Q", 1 << 62) + content[24:],
    "a key of 2**62 letters": lambda content: content[:24] + struct.pack("<Q", 1 << 62) + content[32:],
    "version 1": lambda content: content[:4] + struct.pack("<I", 1) + content[8:],
    "big endian": lambda content: content[:4] + struct.pack(">I", 3) + content[8:],
    "no UTF-8": lambda content: content.replace(b"general.name", b"general.\xff\xfe\xfd\xfc"),
    "a key twice": lambda content: content.replace(b"general.name", b"general.type"),
    "a tensor twice": lambda content: content.replace(b"blk.1.attn_q.weight", b"blk.1.attn_k.weight"),
    "a value of an unknown type": lambda content: content.replace(
        b"general.name\x08\x00\x00\x00", b"general.name\x4d\x00\x00\x00"
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file(path, name):
    content = path.read_bytes()
    changed = HOSTILE[name](content)
    assert changed != content
    path.write_bytes(changed)
    refused(path)


def test_bits_turned_over_in_the_header(path):
    """Refused, or read as some other file; never anything but our own errors, nor a long wait."""
    content = bytearray(path.read_bytes())
    generator = np.random.default_rng(0)
    for position in generator.integers(0, 12_000, 300):
        turned = bytearray(content)
        turned[position] ^= 1 << int(generator.integers(8))
        path.write_bytes(turned)
        try:
            GgufFile.open(path)
        except InputError as error:
            assert str(error).startswith(f"{path}: ")


# Split files


@pytest.mark.parametrize("number", [0, 1, 2])
def test_any_part_may_be_named(parts, number):
    found = GgufFile.open(parts[number])
    assert found.path == parts[0] and list(found.parts) == parts
    assert {each.path for each in found.tensors.values()} == set(parts)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_part_is_missing(parts, number):
    parts[number].unlink()
    message = refused(parts[(number + 1) % 3])
    assert f"{parts[number].name} is missing beside it" in message


def test_parts_of_different_files(parts, tmp_path):
    parts[1].write_bytes(parts[2].read_bytes())
    assert "says that it is part 2 (from 0) of 3, expected part 1" in refused(parts[0])


def test_split_file_under_a_name_of_its_own(parts):
    renamed = parts[0].rename(parts[0].with_name("renamed.gguf"))
    assert "split.count says 3 parts, its name says 1" in refused(renamed)


def test_type_that_gguf_cannot_decode(tmp_path):
    """Q8_K is a type of intermediate results."""
    kind = KINDS["llama"]
    model = kind.model()
    made = kind.content(model)
    name = "blk.0.attn_q.weight"
    made.tensors["blk.0.attn_q.weight"] = np.zeros((32, 292), np.uint8)
    made.kinds[name] = "Q8_K"
    found = GgufFile.open(write(made, tmp_path / "model.gguf"))
    with pytest.raises(SourceError, match="blk.0.attn_q.weight: values of type Q8_K cannot be decoded"):
        found.tensors[name].values(0, 1)


def test_rows_are_decoded_in_parts(tmp_path):
    kind = QUANTIZED["Q8_0"]
    stored = GgufFile.open(kind.write(kind.model(), tmp_path)).tensors["token_embd.weight"]
    whole = stored.values(0, stored.rows)
    assert np.array_equal(np.concatenate([stored.values(0, 5), stored.values(5, stored.rows)]), whole)
