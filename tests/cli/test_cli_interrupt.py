"""Ctrl-C, a polite kill, and a disk that is full, in the middle of the work."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.sampling import sampled
from tests.helpers.snapshots import snapshot

pytest.importorskip("coremltools")

pytestmark = pytest.mark.usefixtures("work")

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
PATIENCE_S = 120


# In this process, at chosen points


def raising(real: Callable[..., Any], number: int, call: int = 1) -> Callable[..., Any]:
    """The function, with a signal that arrives at its n-th call."""
    calls = 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            signal.raise_signal(number)
        return real(*arguments, **options)

    return wrapped


def interrupted(edkm: Callable[..., Any], work: Path, *arguments: object) -> None:
    before = snapshot(work)
    result = edkm(*arguments)
    assert result.status == 130
    assert result.message == "interrupted; nothing was left behind."
    assert snapshot(work) == before


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("point", ["loading", "clustering", "writing"])
@pytest.mark.parametrize("existing", [False, True])
def test_palettize(edkm, small_folder, work, monkeypatch, number, point, existing):
    from edkm_export import palettization
    from edkm_export.reference import source

    if existing:
        Path("model.pt").write_text("old")
    if point == "loading":
        monkeypatch.setattr(source, "load_model", raising(source.load_model, number))
    elif point == "clustering":
        monkeypatch.setattr(
            palettization, "palettize_weight", raising(palettization.palettize_weight, number, call=5)
        )
    else:

        def half(_contents: Any, file: Any) -> None:
            Path(file).write_bytes(b"half")
            signal.raise_signal(number)

        monkeypatch.setattr(torch, "save", half)
    interrupted(edkm, work, "palettize", small_folder, "--overwrite")


@pytest.mark.parametrize("number", sampled(SIGNALS, 3))
@pytest.mark.parametrize("point", ["reading", "converting", "saving", "verifying"])
@pytest.mark.parametrize("existing", [False, True])
def test_coreml(edkm, small_export, work, monkeypatch, number, point, existing):
    from converters.coreml.read import session
    from converters.coreml.write import bundle, lut_pass, packages
    from edkm_export import checkpoint

    if existing:
        shutil.copytree(small_export.bundle, "bundle")
    if point == "reading":
        monkeypatch.setattr(checkpoint, "load", raising(checkpoint.load, number))
    elif point == "converting":  # inside of coremltools, which must not swallow it
        monkeypatch.setattr(lut_pass, "_build", raising(lut_pass._build, number, call=3))
    elif point == "saving":

        def half(_model: Any, path: Path) -> None:
            path.mkdir()
            (path / "half").write_bytes(b"half")
            signal.raise_signal(number)

        monkeypatch.setattr(packages, "convert", lambda *_arguments, **_options: None)
        monkeypatch.setattr(packages, "save_package", half)
    else:

        def write_bundle(_checkpoint: Any, _plan: Any, folder: Path, _name: str) -> Path:
            shutil.copytree(small_export.bundle, folder, dirs_exist_ok=True)
            return folder / small_export.package.name

        monkeypatch.setattr(bundle, "write_bundle", write_bundle)
        monkeypatch.setattr(session.CoreMLSession, "feed", raising(session.CoreMLSession.feed, number))
    interrupted(
        edkm,
        work,
        "coreml",
        small_export.model,
        "-o",
        "bundle",
        "--overwrite",
        "--sequence-length",
        32,
        "--tokens",
        64,
    )


@pytest.mark.parametrize("number", sampled(SIGNALS, 3))
def test_signal_that_a_library_swallows(edkm, small_export, work, monkeypatch, number):
    """coremltools has dozens of bare `except:`, most of them around imports, and it may arrive in any of them."""
    import coremltools

    real = coremltools.convert

    def convert(*arguments: Any, **options: Any) -> Any:
        with contextlib.suppress(BaseException):
            signal.raise_signal(number)
        return real(*arguments, **options)

    monkeypatch.setattr(coremltools, "convert", convert)
    interrupted(
        edkm, work, "coreml", small_export.model, "-o", "bundle", "--sequence-length", 16, "--no-verify"
    )


# As a process of its own


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    """Where libraries of the processes put their temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@contextlib.contextmanager
def running(*arguments: object, file_size: int | None = None) -> Iterator[subprocess.Popen[str]]:
    """`python -m edkm_export` in the working folder; nothing is left running."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    process = subprocess.Popen(
        [sys.executable, "-m", "edkm_export", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def assert_interrupted(process: subprocess.Popen[str]) -> None:
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, err
    assert (
        err.splitlines()[-1] == "edkm-export: interrupted; nothing was left behind."
        and "Traceback" not in err
    )


@pytest.mark.parametrize("number", sampled(SIGNALS, 3))
def test_palettize_as_a_process(small_folder, work, temporary, tmp_path, number):
    """The calibration text is a pipe: the process waits for it at a known point of its work."""
    os.mkfifo(tmp_path / "text")
    Path("model.pt").write_text("old")
    before = snapshot(work)
    with (
        running("palettize", small_folder, "--calibration", tmp_path / "text", "--overwrite") as process,
        (tmp_path / "text").open("w"),  # returns when the process opens the other end
    ):
        process.send_signal(number)
        assert_interrupted(process)
    assert snapshot(work) == before
    assert snapshot(temporary) == {}


@pytest.mark.parametrize(
    ("number", "delay_s"), sampled([(signal.SIGINT, 0), (signal.SIGTERM, 0.25)], 2, several=True)
)
def test_coreml_as_a_process(tiny_export, work, temporary, number, delay_s):
    """The signal arrives after the temporary folder has appeared, the second one while coremltools is imported."""
    before = snapshot(work)
    with running("coreml", tiny_export.model, "-o", "bundle", "--sequence-length", 64) as process:
        deadline = time.monotonic() + PATIENCE_S
        while not any(work.iterdir()):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(delay_s)
        process.send_signal(number)
        assert_interrupted(process)
    assert snapshot(work) == before
    assert snapshot(temporary) == {}


@pytest.mark.slow  # whole exports in processes of their own: 40 s
@pytest.mark.parametrize(
    ("command", "output", "limit"),
    # A limit on the size of files makes the system refuse a write as a full disk does; each is below the largest file.
    [("palettize", "model.pt", 100_000), ("coreml", "bundle", 300_000)],
)
def test_real_write_that_fails(tiny_llama, tiny_export, work, temporary, command, output, limit):
    before = snapshot(work)
    given = tiny_llama if command == "palettize" else tiny_export.model
    with running(command, given, "-o", output, file_size=limit) as process:
        _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2, err
    last = err.splitlines()[-1]
    assert last.startswith("edkm-export: ") and "Traceback" not in err
    assert "File too large" in last or "no space left" in last or "is the disk full?" in last
    assert snapshot(work) == before
    assert snapshot(temporary) == {}


@pytest.mark.slow  # 40 s
def test_real_job(tiny_llama, work, temporary):
    """Both commands as a user runs them, with nothing of this process."""
    with running("palettize", tiny_llama, "--bits", 3) as process:
        out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert "29 weights palettized" in out
    with running("coreml", "model.pt", "--sequence-length", 32, "--tokens", 64) as process:
        out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert "PASS" in out and "29 of 29" in out
    assert {path.name for path in work.iterdir()} == {"model.pt", "model-coreml"}
    assert snapshot(temporary) == {}


def test_real_mistake(work):
    with running("coreml", "gone.pt") as process:
        out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("edkm-export: gone.pt: no such file; make one with `")
    assert last.endswith(" -m edkm_export palettize MODEL -o gone.pt`.")  # as it was started
