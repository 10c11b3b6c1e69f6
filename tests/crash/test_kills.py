"""Each command is killed at each flush and each change of a name that it makes, once.

What lies in the place of the output then is nothing, the old output, or the whole new one; nothing else that the user
has is changed, and the next run of the same command succeeds and leaves nothing but its output.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from edkm_export import checkpoint
from edkm_export.api import formats
from edkm_export.cli import verify as verify_command
from edkm_export.cli.train import command as train_command
from edkm_export.recipe import load_recipe
from edkm_export.training import run_checkpoints
from edkm_export.verify.report import Report
from tests.helpers.exports import palettized_folder
from tests.helpers.killing import run_command
from tests.helpers.paths import FIXTURES
from tests.helpers.sampling import sampled
from tests.helpers.snapshots import snapshot
from tests.verify.test_report import report


@dataclass(frozen=True)
class Command:
    """A command and its output.

    Attributes:
        arguments: of the command line, in the working folder.
        output: name of what it makes.
        fill: puts an older output there, which the command is to replace; None: there is none.
        check: raises unless an output that is there and is not the old one is whole.
        again: arguments of the next run; None: the same.
    """

    arguments: list[str]
    output: str
    check: Callable[[Path], None]
    fill: Callable[[Path], None] | None = None
    again: list[str] | None = None


def kill_everywhere(command: Command, tmp_path: Path, *, stride: int = 1) -> int:
    """Run the command once, and then killed at each call that the first run made; how many there were.

    With a stride, at one call of so many.
    """
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def start(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "mine.txt").write_text("precious")
        if command.fill is not None:
            command.fill(folder / command.output)
        return folder

    first = start("first")
    before = snapshot(first)
    outcome = run_command(command.arguments, first, scratch)
    assert outcome.status == 0, outcome.err
    command.check(first / command.output)
    assert {path.name for path in first.iterdir()} == {"mine.txt", command.output}
    for number in range(1, len(outcome.calls) + 1, stride):
        where = f"killed before call {number}, {outcome.calls[number - 1]}"
        folder = start("killed")
        killed = run_command(command.arguments, folder, scratch, kill_at=number)
        assert killed.status is None, f"{where}: ended with {killed.status}: {killed.err}"
        found = {name: content for name, content in snapshot(folder).items() if not name.startswith(".")}
        assert found["mine.txt"] == before["mine.txt"]
        if (folder / command.output).exists() and found != before:
            command.check(folder / command.output)
        else:
            assert found == before, where
        again = run_command(command.again or command.arguments, folder, scratch)
        assert again.status == 0, f"{where}, and the next run: {again.err}"
        command.check(folder / command.output)
        assert {path.name for path in folder.iterdir()} == {"mine.txt", command.output}, where
        assert not any(".partial" in name for name in snapshot(folder)), where
        shutil.rmtree(folder)
    return len(outcome.calls)


# What the commands are given


@pytest.fixture(scope="module")
def made(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.pt and, once each was asked for, what was exported from it."""
    folder = tmp_path_factory.mktemp("made")
    palettized_folder(small_folder, load_recipe("4bit"), folder / "model.pt")
    return folder


def check_model(path: Path) -> None:
    assert checkpoint.load(path).palettized


def old_model(path: Path) -> None:
    path.write_bytes(b"the old one")


def old_folder(path: Path) -> None:
    path.mkdir()
    (path / "metadata.json").write_text('{"generator": "edkm-export 0.1.0"}')
    (path / "old").write_text("old")


# what replaces an older output makes all the calls that a new one makes
EXISTING = pytest.mark.parametrize(
    "existing", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["replacing", "new"]
)


@EXISTING
def test_palettize(small_folder, tmp_path, existing):
    arguments = ["palettize", str(small_folder), "--no-estimate", "--overwrite"]
    fill = old_model if existing else None
    assert kill_everywhere(Command(arguments, "model.pt", check_model, fill), tmp_path) >= 4


@pytest.mark.slow
@EXISTING
def test_import(made, small_folder, tmp_path, existing):
    """Of a state dict whose weights take few values."""
    state = checkpoint.load(made / "model.pt").state_dict()
    torch.save({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "state.pt")
    arguments = ["import", str(tmp_path / "state.pt"), "--model", str(small_folder), "-o", "model.pt"]
    fill = old_model if existing else None
    arguments += ["--group-size", "16", "--overwrite"]
    assert kill_everywhere(Command(arguments, "model.pt", check_model, fill), tmp_path) >= 4


FORMATS = {
    "coreml": (formats.CoreMLFormat, ["--interface", "logits", "--sequence-length", "32"], "coremltools"),
    "onnx": (formats.OnnxFormat, [], "onnx"),
    "coreai": (formats.CoreAIFormat, [], "coreai"),
}


@pytest.mark.parametrize("form", sampled(FORMATS, 3, 1))
@EXISTING
@pytest.mark.parametrize("conversion", ["stored", pytest.param("anew", marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_export(made, tmp_path, monkeypatch, form, existing, conversion):
    """Converted once; after that, the folder is filled with a copy of the files, or with `anew` converted each time."""
    kind, options, library = FORMATS[form]
    pytest.importorskip(library)
    whole = made / form
    arguments = [form, str(made / "model.pt"), "--no-verify", "--overwrite", *options, "-o"]
    if not whole.exists():
        outcome = run_command([*arguments, str(whole)], made, tmp_path)
        assert outcome.status == 0, outcome.err
    expected = snapshot(whole).keys()

    def write(_form: object, _checkpoint: object, _plan: object, folder: Path, _name: str) -> Path:
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        return folder

    def check(folder: Path) -> None:
        assert snapshot(folder).keys() == expected
        json.loads((folder / "metadata.json").read_text())

    if conversion == "stored":
        monkeypatch.setattr(kind, "write", write)
    kind().plan(checkpoint.load(made / "model.pt"))  # imports what each process would import again
    fill = old_folder if existing else None
    assert kill_everywhere(Command([*arguments, "out"], "out", check, fill), tmp_path) >= 8


@pytest.mark.slow
@EXISTING
def test_report_of_verify(made, small_folder, tmp_path, monkeypatch, existing):
    """Each of its files is the old or the new one; the verification itself is not repeated."""
    monkeypatch.setattr(verify_command, "prepare", lambda *_, **__: None)
    monkeypatch.setattr(verify_command, "climb", lambda *_: report())
    package = tmp_path / "model.mlpackage"
    package.mkdir()
    monkeypatch.setattr("edkm_export.api.artifacts.find_artifact", lambda path: path)
    monkeypatch.setattr(verify_command, "find_artifact", lambda path: path)
    monkeypatch.setattr(
        verify_command, "_checkpoint_and_artifact", lambda _paths: (made / "model.pt", package)
    )
    new, old = {}, {}

    def fill(folder: Path) -> None:
        report(provenance={"seed": 2}).write(folder)
        old.update(snapshot(folder))

    def check(folder: Path) -> None:
        found = {name: content for name, content in snapshot(folder).items() if not name.startswith(".")}
        if not new:
            new.update(found)
        for name, content in found.items():
            assert content in (new[name], old.get(name)), name
        if (folder / "report.json").exists():
            Report.model_validate_json((folder / "report.json").read_bytes())

    arguments = ["verify", str(package), "--report", "report"]
    command = Command(arguments, "report", check, fill if existing else None)
    assert kill_everywhere(command, tmp_path) >= 8
    assert new.keys() == {"report.json", "report.md", "report.html"}


# Training


@pytest.fixture(scope="module")
def train(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a run of two steps with a checkpoint after each, small and quick."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "text").write_text((FIXTURES / "calibration.txt").read_text()[:2000])
    (folder / "quick.yaml").write_text(
        "calibration_tokens: 16\nimportance: none\ntarget_decoder_bits: null\n"
    )
    return [
        "train", str(small_folder), "--data", str(folder / "text"), "--config", str(folder / "quick.yaml"),
        "--context", "16", "--batch-size", "1", "--steps", "2", "--save-every", "1", "--log-every", "1",
        "--device", "cpu", "-o",
    ]  # fmt: skip


def bits_of(path: Path) -> dict[str, bytes]:
    tensors = checkpoint.load(path).palettized.values()
    return {each.name: each.indices.numpy().tobytes() + each.lut.numpy().tobytes() for each in tensors}


@pytest.fixture(scope="module")
def trained(train: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the run comes to when nothing interrupts it; in this process, so that others need import nothing."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    outcome = CliRunner().invoke(train_command, [*train[1:], str(folder)])
    assert outcome.exit_code == 0, outcome.output
    return bits_of(folder / "model.pt")


@pytest.mark.parametrize(
    ("existing", "again", "stride"),
    [
        (False, "--resume", 20),
        pytest.param(False, "--resume", 1, marks=pytest.mark.slow),  # 90 s each
        pytest.param(True, "--resume", 1, marks=pytest.mark.slow),
        pytest.param(False, "--overwrite", 1, marks=pytest.mark.slow),
    ],
)
def test_train(train, trained, tmp_path, existing, again, stride):
    """The next run ends with the same bits, wherever the first was killed."""

    def check(folder: Path) -> None:
        json.loads((folder / "metadata.json").read_text())
        for path in (folder / "checkpoints").glob("checkpoint-*/complete.json"):
            needed = [run_checkpoints.WEIGHTS, run_checkpoints.OPTIMIZER]
            assert run_checkpoints.last_whole(folder / "checkpoints", needed, pytest.fail) is not None, path
        if (folder / "model.pt").exists():
            assert bits_of(folder / "model.pt") == trained

    arguments = [*train, "run", *(["--overwrite"] if existing else [])]
    command = Command(arguments, "run", check, old_folder if existing else None, again=[*train, "run", again])
    assert kill_everywhere(command, tmp_path, stride=stride) >= 20
