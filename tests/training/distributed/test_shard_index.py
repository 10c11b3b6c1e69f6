"""Checkpoints in parts from strangers: nothing is unpickled but plain tensors, nothing beside the parts is read."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from edkm_export.errors import TrainingError
from edkm_export.training.distributed import shard_files
from edkm_export.training.distributed.shard_index import INDEX, IndexedReader, IndexedWriter


class Harm:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    return {
        "weights.a": torch.randn(6, 4, generator=generator),
        "weights.b": torch.randint(256, (10,), generator=generator).to(torch.uint8),
        "moments.a.step": torch.tensor(3.0),
        "weights.c": torch.randn(3, generator=generator).bfloat16(),
    }


@pytest.fixture
def folder(state, tmp_path):
    path = tmp_path / "shards"
    save(dict(state), storage_writer=IndexedWriter(path, sync_files=True), no_dist=True)
    return path


def read(folder: Path, state):
    found = {name: torch.zeros_like(value) for name, value in state.items()}
    load(found, storage_reader=IndexedReader(folder), no_dist=True)
    return found


def test_what_is_written_is_read(folder, state):
    assert not (folder / ".metadata").exists()
    found = read(folder, state)
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_a_pickle_is_not_run(folder, state, tmp_path):
    (folder / ".metadata").write_bytes(pickle.dumps(Harm(tmp_path / "harmed")))
    read(folder, state)
    (folder / INDEX).write_bytes(pickle.dumps(Harm(tmp_path / "harmed")))
    with pytest.raises(ValueError):
        IndexedReader(folder).read_metadata()
    assert not (tmp_path / "harmed").exists()


def test_a_part_that_is_a_pickle_is_not_run(folder, state, tmp_path):
    part = next(folder.glob("*.distcp"))
    harm = pickle.dumps(Harm(tmp_path / "harmed"))
    part.write_bytes(harm + bytes(part.stat().st_size - len(harm)))
    with pytest.raises(CheckpointException, match="archive"):
        read(folder, state)
    torch.save(Harm(tmp_path / "harmed"), part)
    index = json.loads((folder / INDEX).read_text())
    for tensor in index["tensors"].values():
        tensor["parts"][0] |= {"start": 0, "length": part.stat().st_size}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointException, match="Weights only load failed"):
        read(folder, state)
    with pytest.raises(TrainingError, match="does not fit the model"):  # no wrapped error of PyTorch leaves
        shard_files._read(folder, {name: torch.zeros_like(value) for name, value in state.items()})
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("file", "../other.distcp"),
        ("file", "/etc/passwd"),
        ("file", "__9_9.distcp"),
        ("start", 2**40),
        ("start", -1),
        ("length", 2**40),
        ("length", 1),
        ("offsets", [1, 0]),
        ("offsets", [0]),
        ("sizes", [5, 4]),
        ("sizes", [2**40, 2**40]),
        ("sizes", [6, "4"]),
    ],
)
def test_damaged_indexes_are_refused(folder, field, value):
    index = json.loads((folder / INDEX).read_text())
    index["tensors"]["weights.a"]["parts"][0][field] = value
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises((ValueError, OSError)):
        IndexedReader(folder).read_metadata()


@pytest.mark.parametrize(
    "change", [{"dtype": "object"}, {"size": [2**40, 4]}, {"size": [6, 4, 1]}, {"more": 1}]
)
def test_damaged_tensors_are_refused(folder, change):
    index = json.loads((folder / INDEX).read_text())
    index["tensors"]["weights.a"] |= change
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError):
        IndexedReader(folder).read_metadata()


def test_a_part_that_is_a_pipe_is_not_opened(folder):
    part = next(folder.glob("*.distcp"))
    part.unlink()
    os.mkfifo(part)
    with pytest.raises(OSError):
        IndexedReader(folder).read_metadata()
