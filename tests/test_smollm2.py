"""The main job on a real model of 135M parameters, through the command line as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def edkm(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edkm_export", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict]:
    """Checkpoint, bundle and report."""
    folder = tmp_path_factory.mktemp("smollm2")
    fetch = [sys.executable, str(ROOT / "benchmarks" / "fetch_smollm2.py"), str(folder)]
    model = subprocess.run(fetch, capture_output=True, text=True, check=True).stdout.strip()
    checkpoint, bundle = folder / "smollm2.pt", folder / "bundle"
    calibration = ROOT / "fixtures" / "calibration.txt"
    done = edkm("palettize", model, "--bits", 4, "--calibration", calibration, "-o", checkpoint)
    assert done.returncode == 0, done.stderr
    done = edkm("coreml", checkpoint, "-o", bundle)
    assert done.returncode == 0, done.stdout + done.stderr
    return checkpoint, bundle, json.loads((bundle / "report.json").read_text())


def rung(report: dict, name: str) -> dict:
    (found,) = [rung for rung in report["rungs"] if rung["id"] == name]
    return found


def test_every_tensor_is_bit_exact_and_nothing_is_left_dense(exported):
    report = exported[2]
    assert report["faithful_export"] == "PASS"
    # 30 layers of seven linear weights, and the embedding that is the head too
    assert len(report["tensors"]) == 211
    assert all(tensor["bit_exact"] for tensor in report["tensors"])
    assert rung(report, "bytes")["verdict"] == "PASS"


def test_size_is_what_the_recipe_predicts(exported):
    measures = rung(exported[2], "size")["measures"]
    assert measures["actual_bytes"] == pytest.approx(measures["predicted_bytes"], rel=0.01)
    assert exported[2]["bits_per_weight"] < 5  # 4 bits, LUTs of 16 rows, and the embedding at 8


@pytest.mark.parametrize(("precision", "top1", "kl"), [("float32", 0.999, 1e-5), ("rounded", 0.99, 1e-3)])
def test_the_package_computes_what_hard_pytorch_computes(exported, precision, top1, kl):
    measures = rung(exported[2], f"execution-{precision}")["measures"]
    assert measures["tokens"] >= 1000
    assert measures["top1_agreement"] >= top1 and measures["kl_median"] <= kl


def test_calibrated_clustering_keeps_the_model(exported):
    # Measured: 1.27 times the original's perplexity; plain k-means gives five times.
    assert rung(exported[2], "palettization")["measures"]["perplexity_ratio"] < 1.5


def test_one_changed_index_fails(exported, tmp_path):
    checkpoint, bundle, _ = exported
    (package,) = bundle.glob("*.mlpackage")
    blob = package / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    kept = blob.read_bytes()
    try:
        changed = bytearray(kept)
        changed[len(changed) // 2] ^= 1  # in the middle of some layer's indices
        blob.write_bytes(changed)
        done = edkm("verify", checkpoint, bundle, "--tokens", 64, "--report", tmp_path)
    finally:
        blob.write_bytes(kept)
    assert done.returncode == 1, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert rung(report, "bytes")["verdict"] == "FAIL"
    assert sum(tensor["bit_exact"] is False for tensor in report["tensors"]) == 1
