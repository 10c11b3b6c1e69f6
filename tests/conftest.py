"""The trained fixture, palettized and exported once a session by the library."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # before transformers is imported: no test may depend on the network

import onnx
import pytest
import torch

from edkm_export import checkpoint
from edkm_export.checkpoint import Checkpoint
from edkm_export.recipe import load_recipe
from tests.helpers.checkpoint_files import make_checkpoint
from tests.helpers.command import Result
from tests.helpers.exports import Exported, exported, palettized_folder
from tests.helpers.odd_models import build, save
from tests.helpers.onnx_edits import Edit
from tests.helpers.onnx_models import export, palettized_checkpoint
from tests.helpers.paths import FIXTURES


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Sums in the same order on every machine, and no fight for cores between parallel test processes."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """Folder of the trained Llama, to be read only."""
    return FIXTURES / "tiny-llama"


@pytest.fixture(scope="session")
def held_out() -> str:
    """Text that the trained Llama has not seen."""
    return (FIXTURES / "heldout.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_llama, tmp_path_factory) -> Checkpoint:
    """The trained Llama at 4 bits with a LUT for every 16 rows, embedding at 8 bits; read back from its file."""
    return palettized_folder(tiny_llama, load_recipe("4bit"), tmp_path_factory.mktemp("tiny") / "model.pt")


@pytest.fixture(scope="session")
def tiny_export(tiny_llama, tmp_path_factory) -> Exported:
    """`tiny_checkpoint` as a package, to be read only."""
    return exported(tiny_llama, load_recipe("4bit"), tmp_path_factory.mktemp("tiny-export"))


@pytest.fixture(scope="session")
def dense_export(tiny_llama, tmp_path_factory) -> Exported:
    """The trained Llama exported with nothing palettized."""
    return exported(tiny_llama, load_recipe("dense"), tmp_path_factory.mktemp("dense-export"))


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory) -> Path:
    """Hugging Face folder of a small random Llama, to be read only."""
    return save(build("plain").half(), tmp_path_factory.mktemp("small") / "small-llama")


@pytest.fixture(scope="session")
def small_export(small_folder, tmp_path_factory) -> Exported:
    """The small random Llama at 4 bits as a package, to be read only."""
    return exported(small_folder, load_recipe("4bit"), tmp_path_factory.mktemp("small-export"))


@pytest.fixture
def edkm(monkeypatch, capsys) -> Callable[..., Result]:
    """Run the command line in this process, as `edkm-export ARGUMENTS` does."""
    from edkm_export import interrupts
    from edkm_export.cli.main import main

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["edkm-export", *map(str, arguments)])
        handlers = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as caught:
                main()
        finally:
            monkeypatch.setattr(interrupts, "_arrived", False)  # the next command is a process of its own
            for number, handler in handlers.items():
                signal.signal(number, handler)
        assert isinstance(caught.value.code, int)
        return Result(caught.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A folder that is the working one; tests look into it for what a command left."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def saved(tmp_path) -> Path:
    """The file of a small checkpoint."""
    checkpoint.save(make_checkpoint(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.fixture(scope="session")
def onnx_folder(tmp_path_factory) -> Callable[[str], Path]:
    """Folders by profile, or profile and opset, to be read only."""
    made: dict[str, Path] = {}

    def folder(profile: str) -> Path:
        if profile not in made:
            runtime, *more = profile.split()
            checkpoint = palettized_checkpoint(3, int8=runtime == "fast", int4="int4" in more)
            opset = 18 if "18" in more else None
            made[profile] = export(
                checkpoint, tmp_path_factory.mktemp("onnx") / runtime, runtime=runtime, opset=opset
            )
        return made[profile]

    return folder


@pytest.fixture
def change_onnx(onnx_folder, tmp_path) -> Callable[[str, Edit], Path]:
    """A function that copies the folder of a profile, changes its message, and gives the copy."""

    def apply(profile: str, edit: Edit) -> Path:
        folder = tmp_path / f"changed{len(list(tmp_path.iterdir()))}"
        shutil.copytree(onnx_folder(profile), folder)
        path = folder / "onnx" / "model.onnx"
        model = onnx.load(path, load_external_data=False)
        edit(model)
        path.write_bytes(model.SerializeToString())
        return folder

    return apply
