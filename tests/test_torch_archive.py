"""Files of torch.save within bounds: neither compressed, nor with a pickle larger than any model's."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from edkm_export.errors import CheckpointError
from edkm_export.importing import read_state
from edkm_export.torch_archive import UnsafeArchiveError, load_archive
from tests.helpers.checkpoint_files import refused
from tests.hostile.archives import rewrite


def test_reads_what_torch_saves(tmp_path) -> None:
    contents = {
        "a": torch.arange(6).view(2, 3),
        "b": [1, {"c": torch.ones(3).half()}],
        "d": "text",
        "e": None,
    }
    torch.save(contents, tmp_path / "it.pt")
    for mapped in (True, False):
        found = load_archive(tmp_path / "it.pt", mapped=mapped)
        assert torch.equal(found["a"], contents["a"]) and torch.equal(
            found["b"][1]["c"], contents["b"][1]["c"]
        )
        assert found["d"] == "text" and found["e"] is None


BOMB = pickle.dumps({"format": "a" * (200 << 20)}, protocol=2)
MANY = b"\x80\x02](" + b"}" * (20 << 20) + b"e."


@pytest.mark.parametrize(
    ("data", "method", "message"),
    [
        (None, zipfile.ZIP_DEFLATED, "is compressed"),
        (BOMB, zipfile.ZIP_DEFLATED, "is compressed"),
        (BOMB, zipfile.ZIP_STORED, "more than 4,194,304 are not read"),
        (MANY, zipfile.ZIP_STORED, "more than 4,194,304 are not read"),
        (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", zipfile.ZIP_STORED, ""),
    ],
    ids=["compressed", "a compressed bomb", "a long text", "many objects", "deep"],
)
def test_refused_before_it_is_read(saved, data, method, message) -> None:
    rewrite(saved, data, method)
    assert message in refused(saved)
    with pytest.raises(CheckpointError):
        read_state(saved)


def test_two_readings_of_one_archive_are_refused(saved) -> None:
    """A comment, bytes before it or behind it: zip readers differ in what they take for its directory."""
    whole = saved.read_bytes()
    for changed in (b"PK" + whole, whole + b"\0", whole[:-2] + b"\x01\0x", whole + whole):
        saved.write_bytes(changed)
        with pytest.raises(UnsafeArchiveError):
            load_archive(saved)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "loop", "sparse"])
def test_what_is_no_ordinary_file_is_not_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.pt"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(CheckpointError):
        read_state(path)
    assert refused(path)
