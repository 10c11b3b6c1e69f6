from __future__ import annotations

import errno
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from edkm_export import disk_space
from edkm_export.atomic import atomic_file, atomic_folder
from edkm_export.errors import ConversionError, DiskFullError
from tests.helpers.snapshots import snapshot

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free(monkeypatch):
    """Let any file system have so many bytes free."""

    def set_free(size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(1 << 40, 0, size))

    return set_free


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        Exception("I/O error: No space left on device (os error 28)"),  # as Rust puts it
        Exception("Disk quota exceeded (os error 122)"),
    ],
    ids=["full", "quota", "full, in Rust", "quota, in Rust"],
)
@pytest.mark.parametrize("writer", [atomic_file, atomic_folder])
def test_one_sentence_and_nothing_left(tmp_path, free, writer, error):
    free(1234)
    path = tmp_path / "out"
    with pytest.raises(DiskFullError) as caught, writer(path, needed_bytes=5_000_000) as temporary:
        (temporary if writer is atomic_file else temporary / "weights").write_text("half")
        raise error
    message = str(caught.value)
    assert message.startswith(f"{path}: no space left on the device, or a quota is reached (")
    assert "5,000,000 bytes are needed, 1,238 bytes are free" in message and "\n" not in message
    assert snapshot(tmp_path) == {}


def test_cause_of_another_error_counts(tmp_path):
    with pytest.raises(DiskFullError), atomic_file(tmp_path / "out"):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise ValueError("cannot be written") from error


@pytest.mark.parametrize("error", [RuntimeError("file write failed"), ConversionError("FileWriter")])
def test_vague_error_of_a_library_counts_when_nothing_is_free(tmp_path, free, error):
    free(100)
    with pytest.raises(DiskFullError), atomic_folder(tmp_path / "out"):
        raise error


def test_vague_error_is_left_alone_when_there_is_space(tmp_path, free):
    free(1 << 30)
    with pytest.raises(RuntimeError, match="file write failed"), atomic_folder(tmp_path / "out"):
        raise RuntimeError("file write failed")


def test_other_mistakes_are_left_alone_on_a_full_disk(tmp_path, free):
    free(0)
    with pytest.raises(KeyError), atomic_folder(tmp_path / "out"):
        raise KeyError("name")


def test_refused_before_the_work(tmp_path, free):
    free(999)
    with pytest.raises(DiskFullError, match="1,000 bytes are needed, 999 bytes are free"):
        disk_space.require_space(tmp_path / "out", 1000)
    free(1000)
    disk_space.require_space(tmp_path / "out", 1000)


def test_free_space_of_a_folder_that_is_not_there_yet(tmp_path):
    found = disk_space.free_bytes(tmp_path / "a" / "b" / "out")
    assert found is not None and found > 0


def test_real_device_that_is_always_full():
    full = Path("/dev/full")
    if not full.is_char_device():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError) as caught, full.open("w") as file:
        file.write("x" * 100_000)
    assert disk_space.is_disk_full(caught.value)
    assert "no space left on the device" in disk_space.explain(caught.value)


def test_other_errors_of_the_system_are_named():
    error = OSError(errno.EROFS, "Read-only file system", "model.pt")
    assert disk_space.explain(error) == "model.pt: Read-only file system"
