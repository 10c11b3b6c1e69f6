"""Files that become shorter while they are mapped; without help, the process dies of SIGBUS in each of these cases."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edkm_export.activity import activity
from edkm_export.checkpoint import load
from edkm_export.errors import CheckpointError, InputError
from edkm_export.mapped_files import check_mapped_files, guarding_mapped_files

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it is done on Linux alone")

SIZE = 1 << 20


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[Path, mmap.mmap]:
    """A file of ones, and its map."""
    path = tmp_path / "weights of a model.bin"
    path.write_bytes(b"\x01" * SIZE)
    with path.open("rb") as file:
        return path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@pytest.mark.parametrize("left", [0, 1, 5000, SIZE // 2])
def test_reading_what_is_gone_names_the_file(mapped, left):
    path, content = mapped
    with guarding_mapped_files():
        os.truncate(path, left)
        found = bytes(content[:])
        assert found[: left - left % mmap.PAGESIZE] == b"\x01" * (left - left % mmap.PAGESIZE)
        assert found[-mmap.PAGESIZE :] == bytes(mmap.PAGESIZE)
        with pytest.raises(InputError, match="weights of a model.bin: became shorter"):
            check_mapped_files()
        with pytest.raises(InputError, match="became shorter"), activity("reading"):
            pytest.fail("the body must not run")
    check_mapped_files()  # it is forgotten with the command


def test_reading_what_is_there_is_no_error(mapped):
    path, content = mapped
    with guarding_mapped_files():
        os.truncate(path, SIZE // 2)
        assert content[: SIZE // 2] == b"\x01" * (SIZE // 2)
        check_mapped_files()


def test_a_file_that_was_replaced_is_still_there(mapped):
    path, content = mapped
    with guarding_mapped_files():
        path.unlink()
        path.write_bytes(b"another")
        assert bytes(content[:]) == b"\x01" * SIZE
        check_mapped_files()


def test_the_system_reads_what_is_gone(mapped, tmp_path):
    path, content = mapped
    with guarding_mapped_files(), (tmp_path / "copy").open("wb", buffering=0) as file:
        os.truncate(path, 0)
        with pytest.raises(OSError, match="Bad address"):
            file.write(content)
        with pytest.raises(InputError, match="became shorter"):
            check_mapped_files(look=True)


def test_tensors_of_torch(tmp_path):
    """Read by a kernel of torch, in threads of its own."""
    torch.save({"weight": torch.ones(1 << 20)}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", mmap=True, weights_only=True)
    with guarding_mapped_files():
        os.truncate(tmp_path / "state.pt", 4096)
        state["weight"].sum()
        with pytest.raises(InputError, match="state.pt: became shorter"):
            check_mapped_files()


def test_another_cause_still_ends_the_process(tmp_path):
    code = (
        "import os, signal; from edkm_export.mapped_files import guarding_mapped_files\n"
        "with guarding_mapped_files(): os.kill(os.getpid(), signal.SIGBUS); os.kill(os.getpid(), signal.SIGBUS)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -signal.SIGBUS


def shrinking(function: Callable[..., object], path: Path) -> Callable[..., object]:
    """The function, before which a file loses all but its first page."""

    def wrapped(*arguments: object, **options: object) -> object:
        os.truncate(path, 4096)
        return function(*arguments, **options)

    return wrapped


def test_a_command_whose_checkpoint_shrinks(edkm, small_export, work, monkeypatch):
    """After it was read and checked, while the package is written; nothing of it is left."""
    from edkm_export.api import formats

    shutil.copy(small_export.model, work / "model.pt")
    monkeypatch.setattr(formats.OnnxFormat, "write", shrinking(formats.OnnxFormat.write, work / "model.pt"))
    result = edkm("onnx", "model.pt", "--no-verify")
    assert result.status == 2 and "model.pt: became shorter while it was read" in result.message
    assert {path.name for path in work.iterdir()} == {"model.pt"}
    with pytest.raises(CheckpointError):
        load(work / "model.pt")
