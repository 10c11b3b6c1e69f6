"""ONNX on a real model of 135M parameters: the bits on disk, and the text that comes out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from converters.onnx import load_graph
from converters.onnx.read.session import OnnxSession
from edkm_export import checkpoint as checkpoints
from edkm_export.artifact.generation import first_difference, generate
from edkm_export.artifact.metrics import divergence
from edkm_export.artifact.thresholds import INT8_ACTIVATIONS
from edkm_export.checkpoint import Checkpoint
from edkm_export.reference.hard_model import load_hard_model, load_hard_tokenizer
from edkm_export.reference.torch_session import TorchSession
from edkm_export.text import token_windows
from tests.helpers.onnx_models import export
from tests.helpers.paths import ROOT

PROMPTS = ("The house on the hill", "The capital of France is")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def palettized(tmp_path_factory) -> Callable[[int, str], Checkpoint]:
    """Checkpoints by bits and LUT dtype."""
    folder = tmp_path_factory.mktemp("smollm2")
    fetch = [sys.executable, str(ROOT / "benchmarks" / "fetch_smollm2.py"), str(folder)]
    model = subprocess.run(fetch, capture_output=True, text=True, check=True).stdout.strip()

    def make(n_bits: int, lut_dtype: str) -> Checkpoint:
        path = folder / f"{n_bits}-{lut_dtype}.pt"
        if not path.exists():
            command = [sys.executable, "-m", "edkm_export", "palettize", model, "--bits", str(n_bits)]
            options = ["--lut-dtype", lut_dtype, "--no-estimate"]
            if n_bits == 4:  # of 3 bits only the bits are compared, and calibration takes minutes
                options += ["--calibration", str(ROOT / "fixtures" / "calibration.txt")]
            subprocess.run([*command, *options, "-o", str(path)], check=True)
        return checkpoints.load(path)

    return make


@pytest.mark.parametrize("profile", ["exact", "low-memory", "fast"])
@pytest.mark.parametrize("n_bits", [4, 3])
def test_every_tensor_is_bit_exact(palettized, tmp_path, n_bits, profile):
    made = palettized(n_bits, "int8" if profile == "fast" else "float16")
    found = load_graph(export(made, tmp_path / "out", runtime=profile)).palettized()
    assert len(found) == 211 and found.keys() == made.palettized.keys()
    assert all(found[name].same_bits(tensor) for name, tensor in made.palettized.items())


@pytest.mark.parametrize("profile", ["exact", "low-memory"])
def test_128_greedy_tokens(palettized, tmp_path, profile):
    made = palettized(4, "float16")
    tokenizer, hard = load_hard_tokenizer(made), TorchSession(load_hard_model(made))
    session = OnnxSession.open(export(made, tmp_path / "out", runtime=profile))
    for prompt in PROMPTS:
        ids = torch.tensor(tokenizer(prompt).input_ids)
        expected = generate(hard, ids, max_new_tokens=128).choices
        difference = first_difference(expected, generate(session, ids, max_new_tokens=128).choices)
        assert difference is None or difference.near_tie, difference


def test_fast_stays_close(palettized, tmp_path):
    made = palettized(4, "int8")
    hard = TorchSession(load_hard_model(made))
    session = OnnxSession.open(export(made, tmp_path / "out", runtime="fast"))
    text = (ROOT / "fixtures" / "heldout.txt").read_text(encoding="utf-8")
    pairs = []
    for window in token_windows(text, load_hard_tokenizer(made), tokens=512, context=256, source="held out"):
        hard.reset()
        session.reset()
        pairs.append((hard.feed(window), session.feed(window)))
    found = divergence(pairs)
    assert found.settled_agreement >= INT8_ACTIVATIONS.top1 and found.kl_median <= INT8_ACTIVATIONS.median_kl
