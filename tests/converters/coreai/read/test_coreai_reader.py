"""Core AI models read without Apple's package: what is in them, and what is refused.

The files are those of `fixtures/make_coreai.py`; `model.pt` beside them holds the weights that were written.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from converters.coreai.read.asset import load_asset
from converters.coreai.read.bytecode import read_bytecode
from converters.coreai.read.cursor import Cursor
from edkm_export import checkpoint
from edkm_export.errors import PackageError
from tests.helpers.coreai_models import DENSE, FORMS
from tests.helpers.paths import FIXTURES, ROOT

FOLDER = FIXTURES / "coreai"


@pytest.fixture(scope="module")
def written():
    return checkpoint.load(FOLDER / "model.pt")


@pytest.fixture
def copied(tmp_path) -> Path:
    return Path(shutil.copytree(FOLDER / "model.aimodel", tmp_path / "model.aimodel"))


def mend_hash(asset: Path) -> None:
    (asset / "main.hash").write_bytes(hashlib.sha256((asset / "main.mlirb").read_bytes()).digest())


def edit_metadata(asset: Path, edit) -> None:
    path = asset / "metadata.json"
    metadata = json.loads(path.read_text())
    edit(metadata)
    path.write_text(json.dumps(metadata))


def refusal(asset: Path) -> str:
    with pytest.raises(PackageError) as caught:
        found = load_asset(asset)
        found.palettized()
        found.dense()
    message = str(caught.value)
    assert message.startswith(str(asset)) and "\n" not in message
    return message


@pytest.mark.parametrize("name", ["model", "padded"])
def test_every_form_of_palette_comes_back_bit_for_bit(name, written):
    found = load_asset(FOLDER / f"{name}.aimodel").palettized()
    assert found.keys() == FORMS.keys()
    for parameter, tensor in written.palettized.items():
        assert found[parameter].same_bits(tensor), parameter


def test_indices_of_3_bits_are_held_in_3_bits_or_in_4():
    bits = {
        name: sorted({palette.n_bits for palette in load_asset(FOLDER / f"{name}.aimodel").palettes()})
        for name in ("model", "padded")
    }
    assert bits == {"model": [1, 2, 3, 4, 6, 8], "padded": [1, 2, 4, 6, 8]}


def test_other_weights_come_back(written):
    found = load_asset(FOLDER / "model.aimodel").dense()
    assert found.keys() == written.dense.keys() and DENSE in found
    for name, tensor in written.dense.items():
        assert torch.equal(found[name], tensor.half()), name


def test_a_tied_weight_is_stored_and_decoded_once(written):
    main = load_asset(FOLDER / "model.aimodel").program.public["main"]
    assert len(list(main.operations("primitive.lut_to_dense_v1"))) == len(written.palettized)


def test_functions_inputs_outputs_and_states():
    program = load_asset(FOLDER / "model.aimodel").program
    assert list(program.public) == ["main"]
    main = program.public["main"]
    described = {
        kind: {name: str(form) for name, form in getattr(main, kind).items()}
        for kind in ("inputs", "outputs", "states")
    }
    assert described == {
        "inputs": {"input_ids": "int32 [1, ?]", "position_ids": "int32 [1, ?]"},
        "outputs": {"logits": "float16 [1, ?, 320]"},
        "states": {"keyCache": "float16 [2, 1, 2, ?, 8]", "valueCache": "float16 [2, 1, 2, ?, 8]"},
    }
    assert list(main.inputs) == ["input_ids", "position_ids"]
    assert main.op_counts()["primitive.lut_to_dense_v1"] == len(FORMS)


def test_reading_needs_no_package_of_apple():
    code = """
import sys
sys.modules["coreai"] = sys.modules["coreai_torch"] = None
from converters.coreai import load_asset
print(len(load_asset("fixtures/coreai/model.aimodel").palettized()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == str(len(FORMS)), done.stderr


def test_a_folder_with_several_models_is_not_guessed():
    with pytest.raises(PackageError, match=r"expected one \.aimodel in it, found 3"):
        load_asset(FOLDER)


def test_a_changed_byte_is_refused_by_the_hash(copied):
    raw = bytearray((copied / "main.mlirb").read_bytes())
    raw[len(raw) // 2] ^= 1
    (copied / "main.mlirb").write_bytes(raw)
    assert "does not have the SHA-256" in refusal(copied)


@pytest.mark.parametrize("file", ["main.mlirb", "main.hash", "metadata.json"])
def test_missing_files(copied, file):
    (copied / file).unlink()
    assert "no such file" in refusal(copied)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("main.mlirb", b"", "cannot be read"),
        ("main.hash", bytes(33), "more than 32 are not read"),
        ("main.hash", bytes(32), "does not have the SHA-256"),
        ("metadata.json", b"{", "is no JSON"),
        ("metadata.json", b"[" * 100_000, "is no JSON"),
        ("metadata.json", b"[]", "is no JSON object"),
        ("metadata.json", b'{"assetVersion": "9.0"}', "its version is '9.0'"),
        ("metadata.json", b'{"assetVersion": "2.0"}', "was not exported by edkm-export"),
    ],
)
def test_damaged_files(copied, file, content, message):
    (copied / file).write_bytes(content)
    assert message in refusal(copied)


def entry(metadata) -> dict:
    return metadata["creatorDefinedMetadata"]["edkm_export"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda told: told.update(format=2), "of format 2"),
        (lambda told: told.update(context=-1), "context"),
        (lambda told: told.update(vocab_size="320"), "vocab_size"),
        (lambda told: told.update(interface="other"), "interface"),
        (lambda told: told.update(more=1), "more"),
        (lambda told: told.pop("dense"), "dense"),
        (lambda told: told["palettized"][next(iter(FORMS))].update(n_bits=2), "has indices of 4 bits"),
        (lambda told: told["palettized"][next(iter(FORMS))].update(n_bits=3), "beyond the 8 entries"),
        (
            lambda told: told["palettized"][next(iter(FORMS))].update(dense_shape=[640, 16]),
            "has indices of shape",
        ),
        (lambda told: told["palettized"][next(iter(FORMS))].update(dense_shape=[1 << 40, 2]), "dense_shape"),
        (lambda told: told["palettized"][next(iter(FORMS))].update(digest="0" * 64), "has the digest"),
        (lambda told: told["palettized"].pop(next(iter(FORMS))), "that the metadata does not name"),
        (lambda told: told["dense"][DENSE].update(digest="0" * 64), "no constant of the program"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_metadata_that_makes_no_sense(copied, edit, message):
    edit_metadata(copied, lambda metadata: edit(entry(metadata)))
    assert message in refusal(copied)


def test_another_version_of_the_container(copied):
    raw = bytearray((copied / "main.mlirb").read_bytes())
    assert raw[4] == 6 << 1 | 1
    raw[4] = 7 << 1 | 1
    (copied / "main.mlirb").write_bytes(raw)
    mend_hash(copied)
    assert "MLIR bytecode of version 7, this release reads 6" in refusal(copied)


def test_another_dialect(copied):
    raw = (copied / "main.mlirb").read_bytes()
    assert raw.count(b"aicode\0primitive.") + raw.count(b"aicode\0broad") == 1  # the first of the strings
    (copied / "main.mlirb").write_bytes(raw.replace(b"aicode\0", b"aicodf\0", 1))
    mend_hash(copied)
    assert "uses dialect 'aicodf'" in refusal(copied)


def encoded(value: int) -> bytes:
    """A number in MLIR's encoding, by its definition: as many zero bits as further bytes, a one, then the value."""
    for more in range(8):
        if value < 1 << 7 * (more + 1):
            return ((value << more + 1) | 1 << more).to_bytes(more + 1, "little")
    return b"\0" + value.to_bytes(8, "little")


@pytest.mark.parametrize(
    "value", [0, 1, 127, 128, 16383, 16384, 1 << 27, (1 << 49) + 3, 1 << 56, (1 << 64) - 1]
)
def test_numbers(value):
    raw = encoded(value)
    cursor = Cursor(memoryview(raw), 0, None, "number")
    assert cursor.varint() == value and not cursor.left
    for size in range(len(raw)):
        with pytest.raises(PackageError, match="ends early"):
            Cursor(memoryview(raw[:size]), 0, None, "number").varint()


def test_an_empty_program():
    with pytest.raises(PackageError, match="ends early"):
        read_bytecode(memoryview(b""))
