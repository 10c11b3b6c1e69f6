"""Before the first step: presets on any model, targets that cannot be met, data that is too little, nothing left."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

from edkm_export.checkpoint import load
from edkm_export.cli.train import command
from edkm_export.training import run, run_checkpoints
from edkm_export.training.preparation import Preparation
from edkm_export.training.train_config import PRESETS
from edkm_export.training.trainer import PaletteTrainer
from tests.helpers.odd_models import build, build_tokenizer, save
from tests.helpers.paths import FIXTURES
from tests.helpers.sampling import sampled
from tests.helpers.snapshots import snapshot

DATA = FIXTURES / "calibration.txt"
QUICK = ("--context", 32, "--batch-size", 2, "--steps", 2, "--device", "cpu")

pytestmark = pytest.mark.usefixtures("work")


@pytest.fixture
def train(edkm, tmp_path) -> Callable[..., Any]:
    """`edkm-export train MODEL --data ... -o run` of two short steps; further options after the model."""

    quick = tmp_path / "quick.yaml"
    quick.write_text("calibration_tokens: 64")

    def call(model: Path, *options: object, data: Path = DATA) -> Any:
        return edkm("train", model, "--data", data, "-o", "run", "--config", quick, *QUICK, *options)

    return call


# the others with the slow tests: a run is 1 to 3 s
@pytest.mark.parametrize(
    "preset",
    [name if name == "4bit" else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS],
)
def test_every_preset_takes_the_fixture(train, tiny_llama, preset):
    result = train(tiny_llama, "--preset", preset)
    assert result.status == 0, result.err
    said = float(result.err.partition(" bits a weight of the decoder, LUTs included")[0].split()[-1])
    made = load(Path("run/model.pt"))
    inner = {name: tensor for name, tensor in made.palettized.items() if "embed_tokens" not in name}
    size = sum(8 * tensor.indices.numel() + 16 * tensor.lut.numel() for tensor in inner.values())
    assert said == pytest.approx(size / sum(tensor.numel for tensor in inner.values()), abs=0.006)
    # 256 bits of a LUT for 16 rows of 128: 4 bits cannot be had at the 4.1 that the preset aims at
    assert ("4.1 was aimed at" in result.err) == (preset == "4bit")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "preset", "told"),
    [("odd_sizes", "4bit", True), ("hidden_not_16", "2bit", True), ("one_layer", "3bit", False)],
)
def test_presets_take_odd_shapes(train, tmp_path, shape, preset, told):
    result = train(save(build(shape), tmp_path / "odd"), "--preset", preset)
    assert result.status == 0, result.err
    assert ("which does not divide theirs" in result.err) == told


def test_a_target_that_was_set_is_met_with_fewer_bits(train, tiny_llama):
    """4 bits take 4.104 with their LUTs, so that 4.1 is 3 bits and layers of more."""
    assert train(tiny_llama, "--target-decoder-bits", 4.1).status == 0
    made = load(Path("run/model.pt"))
    sizes = {tensor.n_bits for name, tensor in made.palettized.items() if "embed_tokens" not in name}
    assert min(sizes) == 3 and max(sizes) > 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--target-decoder-bits", 4.1, "--bits", 4],
            "--target-decoder-bits 4.1: recipe 4bitg16 takes 4.11 bits a weight",
        ),
        (
            ["--target-decoder-bits", 1.01],
            "takes at least 1.02 bits a weight in the decoder, 1 bit and its LUTs",
        ),
        (
            ["--target-decoder-bits", 3, "--recipe", "3bit"],
            "--target-decoder-bits 3: recipe 3bitg16 takes 3.06 bits a weight",
        ),
        (
            ["--group-size", 24],
            "group_size 24 does not divide its 128 output rows; use 4, 8, 16, 32, 64 or 128.",
        ),
    ],
)
def test_what_was_set_and_cannot_be_met(train, tiny_llama, work, monkeypatch, options, message):
    monkeypatch.setattr(run, "open_weights", lambda *_: pytest.fail("the model must not be loaded"))
    result = train(tiny_llama, *options)
    assert result.status == 2 and message in result.message
    assert snapshot(work) == {}


@pytest.mark.parametrize(
    ("settings", "fewest"), sampled([("target_decoder_bits: 3.5", 3), ("bits: 2", 2)], 2, several=True)
)
def test_bits_of_a_file_are_those_of_the_command_line(train, tiny_llama, tmp_path, settings, fewest):
    """A target has the most bits that fit, and bits without a target are those of all layers."""
    (tmp_path / "mine.yaml").write_text(f"calibration_tokens: 64\n{settings}")
    assert train(tiny_llama, "--config", tmp_path / "mine.yaml").status == 0
    made = load(Path("run/model.pt"))
    sizes = {tensor.n_bits for name, tensor in made.palettized.items() if "embed_tokens" not in name}
    assert min(sizes) == fewest and (len(sizes) > 1) == ("target" in settings)


@pytest.mark.slow
def test_the_least_that_is_named_can_be_met(train, tiny_llama):
    assert train(tiny_llama, "--target-decoder-bits", 4.11, "--bits", 4).status == 0
    assert train(tiny_llama, "--target-decoder-bits", 1.02, "--overwrite").status == 0


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"word", [], " tokens, but a window takes 32; give more text, or a smaller --context."),
        (b"", [], "text: is empty"),
        (b"words\0" * 99, [], "text: is not text (character 5 is zero)"),
        (b"\x80\x02" * 99, [], "text: is not UTF-8 text (byte 0)"),
        (b"words " * 99, ["--eval-text", "short"], "short: holds 4 characters, and at least 32 tokens"),
        (b"words " * 99, ["--eval-text", "gone"], "gone: no such text file."),
        (b"words " * 99, ["--eval-text", "few"], " tokens, at least 32 are needed; use a longer text"),
    ],
)
def test_texts_that_will_not_do(train, tiny_llama, tmp_path, monkeypatch, content, options, message):
    (tmp_path / "text").write_bytes(content)
    Path("short").write_text("word")
    Path("few").write_text("It was the first of the month, and all was well.")
    monkeypatch.setattr(run, "open_weights", lambda *_: pytest.fail("the model must not be loaded"))
    result = train(tiny_llama, *options, data=tmp_path / "text")
    assert result.status == 2 and message in result.message
    assert not Path("run").exists()


# Nothing is left of a run without a step


def failing(point: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any, **_options: Any) -> Any:
        if isinstance(error, KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise error

    where = {"loading": run, "preparing": Preparation, "stepping": PaletteTrainer}[point]
    name = {"loading": "open_weights", "preparing": "choose", "stepping": "compute_loss"}[point]
    monkeypatch.setattr(where, name, fail)


@pytest.mark.parametrize(
    ("point", "error", "existing"),
    [
        ("loading", KeyboardInterrupt(), False),
        ("preparing", MemoryError(), True),
        ("stepping", MemoryError(), False),
        ("stepping", KeyboardInterrupt(), True),
    ],
    ids=["loading", "preparing", "stepping", "stepping-interrupt"],
)
def test_nothing_is_left(train, tiny_llama, work, monkeypatch, point, error, existing):
    if existing:
        assert train(tiny_llama).status == 0
    before = snapshot(work)
    failing(point, error, monkeypatch)
    result = train(tiny_llama, *(["--overwrite"] if existing else []))
    assert result.status == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert snapshot(work) == before and set(work.iterdir()) == ({work / "run"} if existing else set())
    assert "--resume" not in result.err.splitlines()[-1]
    monkeypatch.undo()
    monkeypatch.chdir(work)


def killed_while(train: Callable[..., Any], model: Path, point: str, *options: object) -> None:
    """The command in a process that is killed there."""
    child = os.fork()
    if not child:
        gc.freeze()  # a session of onnxruntime that another test left would wait for its threads, which are not here
        with pytest.MonkeyPatch.context() as patch:
            where = {"preparing": Preparation, "stepping": PaletteTrainer}[point]
            name = {"preparing": "choose", "stepping": "compute_loss"}[point]
            patch.setattr(where, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
            train(model, *options)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("point", ["preparing", "stepping"])
def test_a_run_that_is_killed_before_its_first_step(train, tiny_llama, work, point):
    """There is no run then, or the one that it was to replace; the next one removes what else there is."""
    killed_while(train, tiny_llama, point)
    assert not Path("run").exists()
    assert train(tiny_llama).status == 0 and set(work.iterdir()) == {work / "run"}
    before = snapshot(work / "run")
    killed_while(train, tiny_llama, point, "--overwrite")
    assert snapshot(work / "run") == before
    assert train(tiny_llama, "--resume").status == 0 and set(work.iterdir()) == {work / "run"}


@pytest.mark.slow
def test_one_of_two_runs_in_a_folder_proceeds(train, tiny_llama, monkeypatch):
    """The other one says why it does not, whenever it starts and whatever it is to do."""
    assert train(tiny_llama).status == 0
    refused, real = [], {"choose": Preparation.choose, "compute_loss": PaletteTrainer.compute_loss}

    def meanwhile(name: str) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(Preparation, "choose", lambda *_, **__: pytest.fail("two runs"))
                refused.extend(attempt(tiny_llama, *how) for how in ([], ["--resume"], ["--overwrite"]))
            return real[name](*arguments, **options)

        return wrapped

    def attempt(model: Path, *options: object) -> str:
        outcome = CliRunner().invoke(
            command, [*map(str, (model, "--data", DATA, "-o", "run", *QUICK, *options))]
        )
        return str(outcome.exception)

    monkeypatch.setattr(Preparation, "choose", meanwhile("choose"))
    monkeypatch.setattr(PaletteTrainer, "compute_loss", meanwhile("compute_loss"))
    assert train(tiny_llama, "--overwrite").status == 0
    assert len(refused) == 3 * 3
    assert set(refused) == {"run is being written by another process; wait for it, or choose another -o."}


@pytest.mark.parametrize("option", sampled(["--resume", "--overwrite"], 2))
def test_a_folder_that_holds_leftovers_alone(train, tiny_llama, option):
    Path("run/.metadata.json.partial").mkdir(parents=True)
    Path("run/.metadata.json.x7.partial").mkdir()
    assert train(tiny_llama, option).status == 0
    assert load(Path("run/model.pt")).palettized and not list(Path("run").glob(".*"))


@pytest.mark.slow
def test_a_link_to_a_folder_of_a_run(train, tiny_llama, tmp_path):
    """The run lies where the link points, and the link stays."""
    (tmp_path / "large").mkdir()
    Path("run").symlink_to(tmp_path / "large", target_is_directory=True)
    assert train(tiny_llama, "--overwrite").status == 0
    assert train(tiny_llama, "--resume").status == 0
    assert Path("run").is_symlink() and (tmp_path / "large" / "model.pt").is_file()


def test_a_folder_that_was_there_stays(train, tiny_llama, monkeypatch):
    Path("run").mkdir()
    failing("preparing", MemoryError(), monkeypatch)
    assert train(tiny_llama, "--overwrite").status == 2
    assert Path("run").is_dir() and not any(Path("run").iterdir())


# What is said of going on


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = PaletteTrainer.compute_loss

    def interrupted(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == step:
            signal.raise_signal(signal.SIGINT)
        return compute(self, *arguments, **options)

    monkeypatch.setattr(PaletteTrainer, "compute_loss", interrupted)


@pytest.mark.slow
def test_stopped_before_the_first_checkpoint(train, tiny_llama, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(1, patch)
        result = train(tiny_llama, "--steps", 6, "--log-every", 1)
    assert result.status == 130
    assert "stopped before the first checkpoint (one is saved every 200 steps)" in result.err
    assert "checkpoint-" not in result.err
    again = train(tiny_llama, "--resume")
    assert (
        again.status == 0 and "run: there is no checkpoint to go on from, so the run starts anew" in again.err
    )


@pytest.mark.slow
def test_stopped_after_a_checkpoint(train, edkm, tiny_llama, monkeypatch):
    options = ("--steps", 6, "--save-every", 2)
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        result = train(tiny_llama, *options)
    last = run_checkpoints.last_complete(Path("run/checkpoints"))
    assert result.status == 130 and f"--resume goes on from step 2 ({last})" in result.err
    for arguments in (("coreml", "run/model.pt"), ("onnx", "run")):
        message = edkm(*arguments).message
        assert "the training run in run has not finished" in message
        command = json.loads(Path("run/metadata.json").read_text())["command"]
        assert message.endswith(f"finish it with: {' '.join([*command, '--resume'])}")
    result = train(tiny_llama, *options, "--resume")
    assert result.status == 0 and f"run: goes on from step 2 ({last})" in result.err
    result = train(tiny_llama, *options, "--resume")
    assert result.status == 0 and "all 6 steps are done; model.pt is written again" in result.err


def test_resume_without_a_run(train, tiny_llama):
    result = train(tiny_llama, "--resume")
    assert result.status == 0 and "run: there is no run to go on with, so a new one starts" in result.err


def test_gpt2_has_groups_that_fit(train, tmp_path):
    config = transformers.GPT2Config(vocab_size=320, n_positions=64, n_embd=24, n_layer=1, n_head=2)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    build_tokenizer(320).save_pretrained(tmp_path / "gpt2")
    result = train(tmp_path / "gpt2")
    assert result.status == 0, result.err
    made = load(Path("run/model.pt"))
    assert made.palettized["transformer.h.0.mlp.c_proj.weight"].group_size == 12
