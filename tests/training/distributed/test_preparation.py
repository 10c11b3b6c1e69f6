"""What two processes prepare before the first step is what one prepares, to the last bit, and none holds it whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edkm_export.checkpoint import load
from tests.training.distributed.test_distributed import assert_same_bits, run, seen, two_processes
from tests.training.test_run import one_thread

# Nothing moves in the one step: the result is what was prepared.
STILL: dict[str, Any] = {"steps": 1, "weight_rate": 0.0, "lut_rate": 0.0, "norm_rate": 0.0}
FISHER = {
    **STILL, "importance": "fisher", "fold_scales": True, "target_decoder_bits": 2.7, "calibration_tokens": 64,
    "self_generated": 64, "eval_every": 1, "group_size": 32,
}  # fmt: skip
WHOLE = {
    **STILL, "importance": "fisher", "fold_scales": True, "bits": 2, "target_bits": 5.0, "calibration_tokens": 64,
}  # fmt: skip
ENERGY = {**STILL, "importance": "energy", "group_size": 0, "bits": 3, "lut_dtype": "int8", "bf16": True}


@pytest.mark.slow  # six runs, three of them in two processes
def test_two_processes_prepare_what_one_does(tmp_path: Path) -> None:
    kinds = {"fisher": FISHER, "whole": WHOLE, "energy": ENERGY}
    with one_thread():
        for name, changes in kinds.items():
            run(tmp_path / f"{name}-one", changes)
    two_processes(tmp_path, *((name, changes, {}) for name, changes in kinds.items()))
    for name in kinds:
        found = seen(tmp_path, name)
        one = load(tmp_path / f"{name}-one" / "model.pt")
        assert one.recipe == load(tmp_path / name / "model.pt").recipe
        assert_same_bits(tmp_path / f"{name}-one", tmp_path / name, losses=False)
        # Beside embedding and head, which are one here, a process holds at most one layer whole.
        sizes = {key: each.shape[0] * each.shape[1] for key, each in one.palettized.items()}
        layer = max(
            sum(size for key, size in sizes.items() if f".layers.{number}." in key) for number in range(4)
        )
        outer = sum(size for key, size in sizes.items() if ".layers." not in key)
        assert layer + outer < 0.7 * sum(sizes.values())
        for each in found:
            assert 0 < each["whole"] <= layer + outer
    assert len({each.n_bits for each in load(tmp_path / "fisher" / "model.pt").palettized.values()}) > 2
