"""Commands as processes of their own, where the system gives them little: signals, memory, files, folders, disks."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import FIXTURES
from tests.helpers.sampling import sampled
from tests.helpers.snapshots import snapshot

pytestmark = [
    pytest.mark.usefixtures("work"),
    pytest.mark.skipif(sys.platform != "linux", reason="limits and files of Linux"),
]

PATIENCE_S = 120
NOBODY = 65534


def start(
    *arguments: object, prepare: Callable[[], None] | None = None, **environment: str | None
) -> subprocess.Popen[str]:
    """`python -m edkm_export` in the working folder; environment variables that are None are taken away."""
    values = {**os.environ, "OMP_NUM_THREADS": "1", **environment}

    def before() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if prepare is not None:
            prepare()

    return subprocess.Popen(
        [sys.executable, "-m", "edkm_export", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=before,
        env={name: value for name, value in values.items() if value is not None},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in err, err
    return process.returncode, out, err


def run(*arguments: object, **how: object) -> tuple[int, str, str]:
    return finish(start(*arguments, **how))


# Signals


@contextlib.contextmanager
def waiting(command: str, tmp_path: Path) -> Iterator[tuple[list[str], Path]]:
    """Arguments with which a command waits for what is written into a pipe, and the pipe.

    Whatever a command reads first, a model.pt or a text, is a pipe in its place.
    """
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    given = {
        "palettize": [FIXTURES / "tiny-llama", "--calibration", pipe],
        "train": [FIXTURES / "tiny-llama", "--data", pipe, "-o", "run"],
        "generate": [FIXTURES / "tiny-llama", "--prompt-file", pipe],
    }
    yield [command, *map(str, given[command])], pipe


@pytest.mark.parametrize("number", sampled([signal.SIGTERM, signal.SIGHUP], 2))
@pytest.mark.parametrize("command", sampled(["palettize", "train"], 2))
def test_a_signal_ends_a_command_in_order(tmp_path, work, command, number):
    with waiting(command, tmp_path) as (arguments, pipe):
        process = start(*arguments)
        with pipe.open("w"):  # returns when the command opens the other end
            process.send_signal(number)
            status, _, err = finish(process)
    assert status == 130 and "nothing was left behind" in err.splitlines()[-1]
    assert snapshot(work) == {}


@pytest.mark.parametrize(
    "command", ["inspect", "coreml", "onnx", "coreai", "verify", "compare", "generate", "import"]
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_each_command_in_order(edkm, saved, work, monkeypatch, command, number):
    """It arrives while the model is read, which each of these does first."""
    from edkm_export import checkpoint, importing

    def arrive(*_: object, **__: object) -> None:
        signal.raise_signal(number)
        time.sleep(1)

    monkeypatch.setattr(checkpoint, "load", arrive)
    monkeypatch.setattr(importing, "read_state", arrive)
    (work / "folder").mkdir()
    (work / "folder" / "model.onnx").write_bytes(b"")
    arguments = {
        "inspect": [saved],
        "coreml": [saved, "-o", "out"],
        "onnx": [saved, "-o", "out"],
        "coreai": [saved, "-o", "out"],
        "verify": [saved, "folder/model.onnx"],
        "compare": [saved, saved, "-o", "page.html"],
        "generate": [saved, "--prompt", "a"],
        "import": [saved, "-o", "new.pt", "--model", FIXTURES / "tiny-llama"],
    }[command]
    before = snapshot(work)
    result = edkm(command, *arguments)
    assert (result.status, result.message) == (130, "interrupted; nothing was left behind.")
    assert snapshot(work) == before


@pytest.mark.slow
def test_a_hangup_that_is_ignored_stays_so(tmp_path, work):
    """Under nohup the command goes on when the terminal is closed."""
    with waiting("palettize", tmp_path) as (arguments, pipe):
        process = start(*arguments, prepare=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
        with pipe.open("w") as file:
            process.send_signal(signal.SIGHUP)
            time.sleep(0.2)
            file.write((FIXTURES / "calibration.txt").read_text()[:4000])
        status, _, err = finish(process)
    assert status == 0, err
    assert (work / "model.pt").is_file()


# Memory and open files


@pytest.mark.parametrize("gibibytes", sampled([0.75, 1.5, 2.5], 3, 1))
@pytest.mark.parametrize("command", ["inspect", "palettize"])
def test_little_address_space(saved, small_folder, work, command, gibibytes):
    """Where importing torch is too much, where threads are, and where the work is: it is never a mistake of ours."""
    limit = int(gibibytes * 2**30)
    arguments = ["inspect", saved] if command == "inspect" else ["palettize", small_folder, "--no-estimate"]
    status, _, err = run(*arguments, prepare=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
    assert status in (0, 2), err
    if status:
        assert err.splitlines()[-1].startswith("edkm-export: out of memory"), err
        assert snapshot(work) == {}


@pytest.mark.parametrize("count", sampled([8, 16, 32], 3, 1))
def test_few_open_files(saved, count):
    status, _, err = run(
        "inspect", saved, prepare=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))
    )
    assert status in (0, 2), err
    if status:
        assert "too many open files" in err.splitlines()[-1]


# Folders and the environment


def as_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


@pytest.mark.parametrize(
    "environment",
    sampled(
        [
            {"HOME": None},
            {"HOME": "/nowhere", "XDG_CACHE_HOME": "/nowhere/cache"},
            {"TMPDIR": "/nowhere"},
            {"TMPDIR": "/dev/full"},
        ],
        4,
        1,
    ),
    ids=["no HOME", "HOME is missing", "TMPDIR is missing", "TMPDIR is no folder"],
)
def test_an_environment_without_places(small_folder, work, environment):
    status, _, err = run("palettize", small_folder, "--no-estimate", **environment)
    assert status == 0, err
    assert {path.name for path in work.iterdir()} == {"model.pt"}


def test_no_place_for_temporary_files(small_folder, work, monkeypatch, edkm):
    """Neither TMPDIR nor any of the usual folders: the message says what is missing."""
    import tempfile

    def nowhere(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp', '/var/tmp']")

    monkeypatch.setattr(tempfile, "mkdtemp", nowhere)
    result = edkm("palettize", small_folder, "--no-estimate")
    assert result.status == 2 and "No usable temporary directory" in result.message
    assert snapshot(work) == {}


# Disks


FULL = OSError(28, "No space left on device")


def fail(*_: object, **__: object) -> None:
    raise FULL


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_for_import(edkm, small_export, small_folder, work, monkeypatch, existing):
    import torch

    state = small_export.checkpoint.state_dict()
    torch.save({name: tensor.clone() for name, tensor in state.items()}, work / "state.pt")
    if existing:
        (work / "model.pt").write_text("old")
    before = snapshot(work)
    monkeypatch.setattr(torch, "save", fail)
    result = edkm("import", "state.pt", "--model", small_folder, "-o", "model.pt", "--overwrite")
    assert result.status == 2 and "no space left on the device" in result.message
    assert snapshot(work) == before


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_for_compare(edkm, small_export, work, monkeypatch, held_out, existing):
    from edkm_export.verify import compare_models

    (work / "text.txt").write_text(held_out[:4000])
    if existing:
        (work / "page.html").write_text("old")
    before = snapshot(work)
    real = Path.write_text

    def write_text(self: Path, text: str, **options: object) -> int:
        if ".partial" in str(self):
            real(self, text[: len(text) // 2], **options)
            raise FULL
        return real(self, text, **options)

    assert compare_models is not None
    monkeypatch.setattr(Path, "write_text", write_text)
    options = ["--text", "text.txt", "--tokens", 64, "--overwrite"]
    result = edkm("compare", small_export.model, small_export.model, "-o", "page.html", *options)
    assert result.status == 2 and "no space left on the device" in result.message
    assert snapshot(work) == before


def test_a_full_disk_for_the_log(edkm, saved):
    if not Path("/dev/full").is_char_device():
        pytest.skip("this system has no /dev/full")
    result = edkm("inspect", saved, "--log-file", "/dev/full")
    assert result.status == 0, result.err
    assert result.err.count("the log is not complete") == 1


# Clocks


def test_a_clock_that_jumps(small_folder, tmp_path, monkeypatch):
    """The time of day goes back by a year in the middle; steps are counted by another clock."""
    from edkm_export.reference.source import Source
    from edkm_export.training.run import Run
    from edkm_export.training.train_config import TrainConfig

    real, calls = time.time, []

    def jumping() -> float:
        calls.append(0)
        return real() - (365 * 86_400 if len(calls) > 3 else 0)

    (tmp_path / "text").write_text((FIXTURES / "calibration.txt").read_text()[:2000])
    config = TrainConfig(
        bits=2, steps=3, batch_size=1, context=16, calibration_tokens=16, importance="none", log_every=1, save_every=1
    )  # fmt: skip
    monkeypatch.setattr(time, "time", jumping)
    outcome = Run(Source.parse(str(small_folder)), [tmp_path / "text"], tmp_path / "run", config).complete(
        device="cpu"
    )
    assert outcome.steps == 3 and 0 <= outcome.seconds < 60
    Run(Source.parse(str(small_folder)), [tmp_path / "text"], tmp_path / "run", config).complete(
        device="cpu", resume=True
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can become a plain user")
@pytest.mark.parametrize("place", ["output", "report"])
def test_a_folder_that_may_not_be_written(edkm, tiny_checkpoint, place):
    """As a plain user, for whom permissions hold; one that may not run this very interpreter, perhaps."""
    with tempfile.TemporaryDirectory() as folder:  # one that others may enter, other than pytest's
        given, closed = Path(folder) / "given", Path(folder) / "closed"
        Path(folder).chmod(0o755)
        given.mkdir()
        closed.mkdir()
        shutil.copy(tiny_checkpoint.path, given / "model.pt")
        model = given / "model.pt"

        def command(target: Path) -> Any:
            if place == "output":
                return edkm("onnx", model, "--no-verify", "-o", target / "out")
            return edkm("compare", model, model, "-o", target / "page.html")

        assert command(given).status == 0  # everything that it imports is there now
        closed.chmod(0o555)
        receive, send = multiprocessing.Pipe(duplex=False)
        child = os.fork()
        if not child:
            try:
                gc.freeze()  # a session of onnxruntime would wait for its threads, which are not here
                as_nobody()
                result = command(closed)
                send.send((result.status, result.err))
            finally:
                os._exit(0)
        send.close()
        assert receive.poll(PATIENCE_S)
        status, err = receive.recv()
        os.waitpid(child, 0)
        assert status == 2 and f"no permission to write to {closed}" in err.splitlines()[-1], err
        assert list(closed.iterdir()) == []


def test_a_full_disk_for_the_report(tmp_path, monkeypatch):
    """None of the three files is written, and the folder is gone if it was made for them."""
    from edkm_export.errors import DiskFullError
    from tests.verify.test_report import report

    real = Path.write_text

    def write_text(self: Path, text: str, **options: object) -> int:
        if self.name == "report.html":
            raise FULL
        return real(self, text, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    place = tmp_path / "reports"
    place.mkdir()
    for folder in (place / "a" / "b", place / "there"):
        with pytest.raises(DiskFullError, match="nothing was left behind"):
            report().write(folder)
        (place / "there").mkdir(exist_ok=True)
    assert snapshot(place) == {"there": "folder"}
