"""Two writers of one output: exactly one succeeds, and the other one says so."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from edkm_export.atomic import MARKER, atomic_file, atomic_folder
from edkm_export.claims import claimed
from edkm_export.errors import OutputExistsError
from tests.helpers.snapshots import snapshot

WRITERS = 4


def write(kind: str, path: Path, number: int, barrier, results, overlapping: bool) -> None:
    """Write `path` together with others; all begin at once, or all end at once."""
    writer = atomic_file if kind == "file" else atomic_folder
    try:
        if not overlapping:
            barrier.wait(60)
        with writer(path) as temporary:
            target = temporary if kind == "file" else temporary / MARKER
            target.write_text(str(number))
        results.put((number, "made"))
    except OutputExistsError as error:
        results.put((number, str(error)))


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_one_of_several_processes_succeeds(tmp_path, kind):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(WRITERS), context.Queue()
    path = tmp_path / "out"
    processes = [
        context.Process(target=write, args=(kind, path, number, barrier, results, False))
        for number in range(WRITERS)
    ]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    made = [number for number, outcome in found.items() if outcome == "made"]
    assert len(made) == 1, found
    assert (path if kind == "file" else path / MARKER).read_text() == str(made[0])
    for number, outcome in found.items():
        assert number in made or str(path) in outcome
    assert {name.partition("/")[0] for name in snapshot(tmp_path)} == {"out"}


@pytest.mark.parametrize("writer", [atomic_file, atomic_folder])
@pytest.mark.parametrize("overwrite", [False, True])
def test_second_writer_is_refused_while_the_first_works(tmp_path, writer, overwrite):
    path = tmp_path / "out"
    with writer(path) as temporary:
        with (
            pytest.raises(OutputExistsError, match=f"{path} is being written by another process"),
            writer(path, overwrite=overwrite),
        ):
            pytest.fail("the body must not run")
        (temporary if writer is atomic_file else temporary / MARKER).write_text("first")
    assert (path if writer is atomic_file else path / MARKER).read_text() == "first"


@pytest.mark.parametrize("writer", [atomic_file, atomic_folder])
def test_output_of_another_program_is_not_replaced(tmp_path, writer):
    """It appears while ours is being written, by a program that knows nothing of our claims."""
    path = tmp_path / "out"
    with (
        pytest.raises(OutputExistsError, match="was made by another process meanwhile"),
        writer(path) as temporary,
    ):
        if writer is atomic_file:
            temporary.write_text("ours")
            path.write_text("theirs")
        else:
            (temporary / MARKER).write_text("ours")
            path.mkdir()
            (path / "file").write_text("theirs")
    assert (path if writer is atomic_file else path / "file").read_text() == "theirs"
    assert {name.partition("/")[0] for name in snapshot(tmp_path)} == {"out"}


def test_what_a_killed_process_left_is_taken_over(tmp_path):
    path = tmp_path / "out"
    child = os.fork()
    if not child:
        with claimed(path) as folder:
            (folder / "half").mkdir()
            (folder / "half" / "weights").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 1  # nobody could clean up
    with claimed(path) as folder:
        assert list(folder.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_claim_without_locks(tmp_path, monkeypatch):
    """On a file system that knows no locks, a name of its own keeps writers apart."""
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claimed(tmp_path / "out") as first, claimed(tmp_path / "out") as second:
        assert first != second and first.is_dir() and second.is_dir()
    assert not first.exists() and not second.exists()
