"""Moments in one or two bytes, and master weights in bfloat16, against Adam in float32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from edkm_export.checkpoint import load
from edkm_export.errors import InputError
from edkm_export.reference.source import Source
from edkm_export.training.run import Run
from edkm_export.training.train_config import TrainConfig
from tests.helpers.paths import FIXTURES
from tests.training.test_run import one_thread

BASE = TrainConfig(
    bits=2,
    steps=8,
    batch_size=4,
    context=32,
    importance="none",
    calibration_tokens=32,
    log_every=1,
    save_every=4,
)
# Largest differences of a step's loss from float32; measured: 4e-4, 3e-3, 2e-2 of about 0.8.
KINDS: dict[str, tuple[dict[str, Any], float]] = {
    "bfloat16": ({"moments": "bfloat16"}, 2e-3),
    "8bit": ({"moments": "8bit"}, 1e-2),
    "masters": ({"moments": "8bit", "masters": "bfloat16"}, 4e-2),
}


def run(folder: Path, changes: dict[str, Any], **arguments: Any) -> list[float]:
    data = [FIXTURES / "calibration.txt"]
    with one_thread():
        made = Run(Source.parse(str(FIXTURES / "tiny-llama")), data, folder, BASE.updated(changes))
        made.complete(device="cpu", **arguments)
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    pytest.importorskip("torchao")
    return run(tmp_path_factory.mktemp("wide") / "run", {})


@pytest.mark.slow  # three runs, each gone on with
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_runs_learn_as_wide_ones_and_go_on(kind: str, wide: list[float], tmp_path: Path) -> None:
    changes, tolerance = KINDS[kind]
    losses = run(tmp_path / "run", changes)
    assert losses != wide and losses == pytest.approx(wide, abs=tolerance)
    state = torch.load(tmp_path / "run" / "checkpoints" / "checkpoint-8" / "optimizer.pt", weights_only=True)
    sizes = sum(
        value.nbytes for own in state["state"].values() for key, value in own.items() if "exp_avg" in key
    )
    weights = sum(
        each.shape[0] * each.shape[1] for each in load(tmp_path / "run" / "model.pt").palettized.values()
    )
    frozen = 1024 * 128  # embedding, which is the output head as well
    assert sizes < (4.3 if kind == "bfloat16" else 2.3) * (weights - frozen)
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-8")
    assert run(tmp_path / "cut", changes, resume=True) == losses
    a, b = load(tmp_path / "run" / "model.pt"), load(tmp_path / "cut" / "model.pt")
    assert all(torch.equal(each.indices, b.palettized[name].indices) for name, each in a.palettized.items())


def test_bfloat16_masters_take_straight_through_gradients() -> None:
    with pytest.raises(InputError, match="masters.*straight-through"):
        BASE.updated({"masters": "bfloat16", "backward": "soft"})
