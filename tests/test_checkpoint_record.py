"""Which model.pt a folder was exported from, and where it is found again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from edkm_export.checkpoint_record import CheckpointRecord
from edkm_export.errors import InputError

CONTENT = b"a checkpoint"


@pytest.fixture
def folders(tmp_path, monkeypatch) -> Path:
    """above/exports/OUT and above/elsewhere, where the user is."""
    (tmp_path / "above" / "exports" / "OUT").mkdir(parents=True)
    (tmp_path / "above" / "elsewhere").mkdir()
    (tmp_path / "above" / "runs" / "one").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above" / "elsewhere")
    return tmp_path / "above"


def put(path: Path, content: bytes = CONTENT) -> Path:
    path.write_bytes(content)
    return path


@pytest.fixture
def record(tmp_path) -> CheckpointRecord:
    return CheckpointRecord.of(put(tmp_path / "model.pt"))


def test_what_is_recorded(record):
    assert record.as_dict() == {
        "file": "model.pt",
        "size_bytes": 12,
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
    }


@pytest.mark.parametrize(
    "place",
    [
        "exports/model.pt",
        "exports/renamed.pt",
        "elsewhere/model.pt",
        "elsewhere/renamed.pt",
        "model.pt",
        "exports/OUT/model.pt",
        "runs/model.pt",
    ],
)
def test_found_by_its_bytes(folders, record, place):
    """Whatever it is called, and whatever lies in its place."""
    for decoy in ("exports/model.pt", "elsewhere/other.pt"):
        put(folders / decoy, b"another one.")  # of the same size
    path = put(folders / place)
    found = record.find(folders / "exports" / "OUT")
    assert found.samefile(path)
    assert found.is_absolute() is not place.startswith("elsewhere")


def test_not_found(folders, record):
    put(folders / "runs" / "one" / "model.pt")  # too deep
    out = folders / "exports" / "OUT"
    with pytest.raises(InputError) as caught:
        record.find(out)
    message = str(caught.value)
    assert message.startswith(
        f"{out}: was exported from model.pt of sha256 {record.sha256[:12]}... (12 bytes)"
    )
    assert all(str(folders / name) in message for name in ("exports", "elsewhere"))
    assert message.endswith(f"edkm-export verify PATH/model.pt {out}")


def test_another_one_is_refused(folders, record):
    path = put(folders / "elsewhere" / "model.pt", b"another one.")
    other = hashlib.sha256(b"another one.").hexdigest()
    with pytest.raises(InputError, match=f"{other[:12]}.*{record.sha256[:12]}.*give that one"):
        record.require(path, folders / "exports" / "OUT")
    record.require(put(folders / "elsewhere" / "right.pt"), folders / "exports" / "OUT")


@pytest.mark.parametrize("asked", ["OUT", "OUT/model.mlpackage", "OUT/onnx/model.onnx"])
def test_read_from_the_folder_or_what_is_in_it(tmp_path, record, asked):
    (tmp_path / "OUT" / "onnx").mkdir(parents=True)
    (tmp_path / "OUT" / "model.mlpackage").mkdir()
    assert CheckpointRecord.read(tmp_path / asked) is None
    (tmp_path / "OUT" / "metadata.json").write_text(json.dumps({"checkpoint": record.as_dict()}))
    assert CheckpointRecord.read(tmp_path / asked) == record


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../../secret.pt"},
        {"file": "/etc/passwd"},
        {"file": ".."},
        {"file": 3},
        {"sha256": None},
        {"size_bytes": "12"},
        {"more": 1},
    ],
)
def test_damaged_records_are_none(tmp_path, record, change):
    (tmp_path / "metadata.json").write_text(json.dumps({"checkpoint": {**record.as_dict(), **change}}))
    assert CheckpointRecord.read(tmp_path) is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"checkpoint": 3}', "[" * 100_000])
def test_other_metadata_holds_none(tmp_path, content):
    (tmp_path / "metadata.json").write_text(content)
    assert CheckpointRecord.read(tmp_path) is None
