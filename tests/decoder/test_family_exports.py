"""Every family from a float model through palettes and a Core ML package to the interpreter, and back to bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edkm_export.checkpoint import Checkpoint
from edkm_export.decoder.build import build_decoder
from edkm_export.decoder.families import gemma
from edkm_export.decoder.whole_sequence import WholeSequence
from edkm_export.palettization import palettize_model
from edkm_export.recipe import uniform_recipe
from edkm_export.reference.hard_model import load_hard_model
from tests.helpers.odd_families import SAMPLED, build
from tests.helpers.sampling import sampled

LENGTH = 24


def palettized(model: Any, bits: int = 4) -> Checkpoint:
    config = model.config.to_dict()
    parts = palettize_model(model.half(), uniform_recipe(bits, 16))
    return Checkpoint(config=config, palettized=parts.palettized, dense=parts.dense, tied=parts.tied)


def exported(made: Checkpoint, folder: Path) -> Any:
    """The package of whole sequences, read back."""
    ct = pytest.importorskip("coremltools")
    from converters.coreml import convert, load_package, save_package

    model = convert(
        WholeSequence(build_decoder(made), made.config, LENGTH).eval(),
        (torch.zeros(1, LENGTH, dtype=torch.int32),),
        made.palettized,
        inputs=[ct.TensorType("input_ids", (1, LENGTH), dtype=np.int32)],
        outputs=[ct.TensorType("logits", dtype=np.float16)],
        prefix="decoder.",
    )
    save_package(model, folder / "model.mlpackage")
    return load_package(folder / "model.mlpackage")


def log_probabilities(made: Checkpoint, tokens: Tensor) -> Tensor:
    """Of transformers' own model, float32 [LENGTH, vocab_size]."""
    with torch.no_grad():
        return load_hard_model(made)(tokens).logits[0].log_softmax(-1)


def divergence(expected: Tensor, logits: Tensor) -> float:
    """The largest KL divergence in nats over the tokens."""
    found = logits[0].float().log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).max())


def some_tokens() -> Tensor:
    return torch.randint(3, 96, (1, LENGTH), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("case", SAMPLED)
def test_family_comes_back_and_computes(case, tmp_path):
    made = palettized(build(case))
    package = exported(made, tmp_path)
    found, dense = package.palettized(), package.dense()
    assert found.keys() == made.palettized.keys()
    assert all(tensor.same_bits(found[name]) for name, tensor in made.palettized.items())
    for name, tensor in made.dense.items():
        assert torch.equal(dense[name].flatten(), tensor.half().flatten()), name
    tokens = some_tokens()
    expected = log_probabilities(made, tokens)
    # RoPE tables and the scales of Gemma are float16 in the package: 3e-7 at most as measured.
    assert divergence(expected, package.run({"input_ids": tokens.int()})["logits"]) < 3e-6
    # Two layers of float16 roundings: 1.2e-5 at most as measured; 4.0e-4 behind the recurrence of Qwen3.5.
    rounded = package.run({"input_ids": tokens.int()}, precision="rounded")["logits"]
    assert divergence(expected, rounded) < (1e-3 if case.startswith("qwen3_5") else 1e-4)


def with_enormous_residuals(case: str) -> Any:
    """A Gemma whose residual stream passes the end of float16 in one channel, as those of trained ones do.

    The norms that read the stream ignore that channel and bring the others back to size, so that a token's logits
    hang on channels sixty thousand times smaller.
    """
    model = build(case)
    with torch.no_grad():
        first, last = model.model.layers
        first.post_feedforward_layernorm.weight[3] = 6e4
        for norm in (last.input_layernorm, last.pre_feedforward_layernorm, model.model.norm):
            norm.weight.add_(1).mul_(2000)
            norm.weight[3] = -1.0  # Gemma multiplies by one plus the weight
    return model


@pytest.mark.parametrize("case", sampled(["gemma2", "gemma3"], 2))
def test_residuals_beyond_float16(case, tmp_path):
    made = palettized(with_enormous_residuals(case), 8)
    tokens = some_tokens()
    hard, largest = load_hard_model(made), []
    hard.model.norm.register_forward_pre_hook(lambda _module, args: largest.append(args[0].abs().amax(-1)))
    with torch.no_grad():
        expected = hard(tokens).logits[0].log_softmax(-1)
    assert (largest[0] > 65504).any() and expected.std() > 0.3  # the model does what it is for
    package = exported(made, tmp_path)
    # 5e-6 and 4e-4 at most as measured: what sinks under the grid beside such a channel comes back 2000 times larger.
    for precision, most in (("float32", 5e-5), ("rounded", 4e-3)):
        logits = package.run({"input_ids": tokens.int()}, precision=precision)["logits"]
        assert logits.isfinite().all()
        assert divergence(expected, logits) < most, precision


@torch.no_grad()
def test_residuals_beyond_float16_need_the_scale(monkeypatch):
    """Natively in float16, with and without."""
    made = palettized(with_enormous_residuals("gemma3"), 8)
    finite = []
    for scale in (gemma._RESIDUAL_SCALE, 1.0):
        monkeypatch.setattr(gemma, "_RESIDUAL_SCALE", scale)
        whole = WholeSequence(build_decoder(made, torch.float16), made.config, LENGTH).half()
        finite.append(bool(whole(some_tokens()).isfinite().all()))
    assert finite == [True, False]
