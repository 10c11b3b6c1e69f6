"""The trained fixture, palettized and exported once a session by the library."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # before transformers is imported: no test may depend on the network

import onnx
import pytest
import torch
from checkpoint_files import make_checkpoint
from odd_models import build, save
from onnx_edits import Edit
from onnx_models import export, palettized_checkpoint

from edkm_export import checkpoint
from edkm_export.checkpoint import Checkpoint
from edkm_export.models.source import Source, load_model, load_tokenizer, tokenizer_files
from edkm_export.palettize import palettize_model
from edkm_export.recipe import Recipe, load_recipe

FIXTURES = Path(__file__).parents[1] / "fixtures"
SEQUENCE_LENGTH = 64


@dataclass(frozen=True)
class Exported:
    """A checkpoint on disk and the folder that was made of it.

    Attributes:
        checkpoint: read back from `model`.
        model: the model.pt.
        bundle: the folder, as `edkm-export coreml --no-verify` leaves it.
        package: the .mlpackage in it.
        weights_size_bytes: predicted.
    """

    checkpoint: Checkpoint
    model: Path
    bundle: Path
    package: Path
    weights_size_bytes: int


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


def palettized_folder(folder: Path, recipe: Recipe, path: Path) -> Checkpoint:
    """What `edkm-export palettize` writes, without calibration."""
    source = Source.parse(str(folder))
    model, tokenizer = load_model(source), load_tokenizer(source)
    files, config = tokenizer_files(tokenizer, model), model.config.to_dict()
    parts = palettize_model(model, recipe, source=str(folder))
    made = Checkpoint(
        config=config,
        palettized=parts.palettized,
        dense=parts.dense,
        tied=parts.tied,
        tokenizer=files,
        recipe=recipe.model_dump(mode="json"),
        provenance={"base_model": source.provenance()},
    )
    checkpoint.save(made, path)
    return checkpoint.load(path)


def exported(folder: Path, recipe: Recipe, work: Path) -> Exported:
    """Palettize a Hugging Face folder and export it."""
    from converters.coreml.bundle import write_bundle
    from converters.coreml.export_plan import plan_export

    made = palettized_folder(folder, recipe, work / "model.pt")
    plan = plan_export(made, interface="logits", sequence_length=SEQUENCE_LENGTH)
    (work / "model-coreml").mkdir()
    package = write_bundle(made, plan, work / "model-coreml", "model")
    return Exported(made, work / "model.pt", work / "model-coreml", package, plan.weights_size_bytes)


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


@dataclass(frozen=True)
class Result:
    """Exit status and what was printed."""

    status: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one line in which a mistake is explained; there is no traceback and nothing after it."""
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("edkm-export: ")]
        assert len(lines) == 1 and self.err.endswith(f"{lines[0]}\n"), self.err
        return lines[0].removeprefix("edkm-export: ")


@pytest.fixture
def edkm(monkeypatch, capsys) -> Callable[..., Result]:
    """Run the command line in this process, as `edkm-export ARGUMENTS` does."""
    from edkm_export import interrupts
    from edkm_export.cli.main import main

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["edkm-export", *map(str, arguments)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
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
