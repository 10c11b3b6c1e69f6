"""A run folder in which files are missing, torn or other ones: --resume goes on from what is whole, or says why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edkm_export.errors import InputError, TrainingError
from edkm_export.training import run_checkpoints, run_log
from edkm_export.training.curve import draw
from tests.helpers.paths import FIXTURES
from tests.helpers.sampling import sampled
from tests.training.test_run import MODEL, TINY, one_thread, run, same_bits

FILES = (
    "weights.pt",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "complete.json",
)
SHORT = TINY.updated({"steps": 4})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2 and 4, to be read only."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with one_thread():
        run(folder, SHORT)
    return folder


@pytest.fixture
def cut(whole: Path, tmp_path: Path) -> Path:
    """A copy without its model.pt."""
    folder = Path(shutil.copytree(whole, tmp_path / "cut"))
    (folder / "model.pt").unlink()
    return folder


def resume(folder: Path) -> list[str]:
    """Go on; what was told."""
    from edkm_export.reference.source import Source
    from edkm_export.training.run import Run

    told: list[str] = []
    data = [FIXTURES / "calibration.txt"]
    with one_thread():
        Run(Source.parse(str(MODEL)), data, folder, SHORT, tell=told.append).complete(
            device="cpu", resume=True
        )
    return told


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def deepen(path: Path) -> None:
    path.write_bytes(b"[" * 100_000)


DAMAGES = {"missing": Path.unlink, "empty": empty, "torn": halve, "changed": flip, "deep": deepen}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", sampled(FILES, 2))
def test_the_checkpoint_before_is_taken(cut: Path, name: str, damage: Callable[[Path], None]) -> None:
    """Which files are looked at, and that none is unpickled, does not depend on the training itself."""
    needed = (*FILES[:-1],)
    folder = cut / "checkpoints"
    damage(folder / "checkpoint-4" / name)
    told: list[str] = []
    assert run_checkpoints.last_whole(folder, needed, told.append) == folder / "checkpoint-2"
    if (name, damage) != ("complete.json", Path.unlink):  # else it was stopped while it was written
        (line,) = told
        assert line.startswith(f"{folder / 'checkpoint-4'}: is passed over: ") and name in line


@pytest.mark.parametrize(
    "mark",
    [
        {},
        [],
        {"step": 4},
        {"step": 3, "elapsed": 1.0},
        {"step": "4", "elapsed": 1.0},
        {"step": 4, "elapsed": -1.0},
        {"step": 4, "elapsed": 1.0, "files": {}},
        {"step": 4, "elapsed": 1.0, "files": {"../../model.pt": {"size_bytes": 0, "sha256": "0" * 64}}},
        {"step": 4, "elapsed": 1.0, "files": {"weights.pt": 7}},
        {"step": 4, "elapsed": 1.0, "more": 1},
    ],
    ids=str,
)
def test_a_mark_that_is_none(cut: Path, mark: Any) -> None:
    folder = cut / "checkpoints"
    (folder / "checkpoint-4" / "complete.json").write_text(json.dumps(mark))
    told: list[str] = []
    assert run_checkpoints.last_whole(folder, FILES[:-1], told.append) == folder / "checkpoint-2"
    assert len(told) == 1


@pytest.mark.parametrize("name", FILES[:-1])
@pytest.mark.parametrize(
    "damage", [Path.unlink, empty, halve, flip], ids=["missing", "empty", "torn", "changed"]
)
def test_a_checkpoint_of_an_older_release_lists_no_files(
    cut: Path, name: str, damage: Callable[[Path], None]
) -> None:
    folder = cut / "checkpoints"
    (folder / "checkpoint-4" / "complete.json").write_text('{"step": 4, "elapsed": 1.5}')
    assert run_checkpoints.last_whole(folder, FILES[:-1], pytest.fail) == folder / "checkpoint-4"
    if name == "trainer_state.json" and damage in (empty, halve, flip):
        return  # it has no checksum of its own
    damage(folder / "checkpoint-4" / name)
    assert run_checkpoints.last_whole(folder, FILES[:-1], [].append) == folder / "checkpoint-2"


def test_going_on_from_the_one_before_ends_with_the_same_bits(whole: Path, cut: Path) -> None:
    (cut / "checkpoints" / "checkpoint-4" / "optimizer.pt").unlink()
    told = resume(cut)
    assert any("checkpoint-4: is passed over: optimizer.pt is missing" in line for line in told)
    assert any("goes on from step 2" in line for line in told)
    assert same_bits(whole / "model.pt", cut / "model.pt")


@pytest.mark.slow
def test_without_a_whole_checkpoint_it_starts_anew(whole: Path, cut: Path) -> None:
    for path in (cut / "checkpoints").glob("checkpoint-*"):
        flip(path / "optimizer.pt")
    told = resume(cut)
    assert sum("is passed over" in line for line in told) == 2
    assert any("no checkpoint to go on from, so the run starts anew" in line for line in told)
    assert same_bits(whole / "model.pt", cut / "model.pt")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("recipe", {"rules": []}, "recipe.rules: "),
        ("recipe", {"rules": [{"bits": 5}]}, "recipe.rules.0.bits: "),
        ("recipe", 5, "recipe: "),
        ("identity", {}, "identity.model: "),
        ("evaluations", {"text": {"original": {"perplexity": "low"}}}, "evaluations.text.original."),
        ("command", [5], "command.0: "),
        ("config", [], "config: "),
        ("config", {"steps": "many"}, r"settings that edkm-export .* does not take \(steps: "),
        ("more", 1, "more: "),
    ],
)  # fmt: skip
def test_metadata_that_does_not_fit(cut: Path, field: str, value: Any, message: str) -> None:
    path = cut / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(InputError, match=rf"metadata.json: .*{message}.*start anew with --overwrite"):
        resume(cut)
    assert (cut / "checkpoints" / "checkpoint-4").is_dir()


@pytest.mark.parametrize("name", sampled(FILES[:-1], 3))
def test_files_that_are_listed_and_do_not_fit(cut: Path, name: str) -> None:
    """Whoever writes the list can write anything; it is a message all the same, and nothing is unpickled."""
    shutil.rmtree(cut / "checkpoints" / "checkpoint-4")
    path = cut / "checkpoints" / "checkpoint-2"
    if name == "trainer_state.json":
        (path / name).write_text('{"global_step": 1}')
    else:
        torch.save({"x": torch.zeros(3)}, path / name)
    (path / "complete.json").unlink()
    run_checkpoints.complete(path, elapsed=1.0)
    with pytest.raises(TrainingError, match="checkpoint-2.*does not fit"):
        resume(cut)


def test_tokens_that_the_original_wrote(tmp_path: Path) -> None:
    from edkm_export.training.tokens import Tokens

    config = SHORT.updated({"self_generated": 64, "steps": 2})
    run(tmp_path / "run", config)
    other = Tokens.load(tmp_path / "run" / "generated.tokens")
    other.ids[3] += 1
    other.save(tmp_path / "run" / "generated.tokens")
    with pytest.raises(InputError, match="generated.tokens: is not what the run was started with"):
        run(tmp_path / "run", config, resume=True)


LINES = [
    b"\xff\xfe\x00binary",
    b"[" * 10_000,
    b"{}",
    b"5",
    b'{"step": "1", "loss": 1, "tokens": 5}',
    b'{"step": 2}',
    b'{"step": 1, "loss": "low", "tokens": 5}',
    b'{"step": -1, "loss": 1, "tokens": 5}',
    b'{"step": 1, "lo',
]


def test_a_log_with_lines_of_others(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    good = [
        b'{"step": 0, "stage": "one-shot", "text": "a", "perplexity": 9.5}',
        b'{"step": 1, "tokens": 64, "loss": 2.5, "dead": 3}',
        b'{"step": 2, "tokens": 128, "loss": NaN}',
    ]
    path.write_bytes(b"\n".join([*LINES, good[0], *LINES, *good[1:], *LINES]))
    assert [record["step"] for record in run_log.records(path)] == [0, 1, 2]
    draw(path, tmp_path / "curve.png")
    run_log.cut(path, 1)
    assert path.read_bytes() == good[0] + b"\n" + good[1] + b"\n"


def test_a_run_with_such_a_log_goes_on(whole: Path, cut: Path) -> None:
    with (cut / "log.jsonl").open("ab") as file:
        file.write(b"\n".join(LINES))
    resume(cut)
    assert [r["step"] for r in run_log.records(cut / "log.jsonl")] == [1, 2, 3, 4]
    assert (cut / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
