"""States that do not grow, in Core ML programs: convolutions and recurrences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from converters.coreml.format import COUNT, DECODE, PREFILL, RECURRENCE_CACHE, REMAINDER_CACHE
from converters.coreml.read.artifact import CoreMLArtifact, open_artifact
from converters.coreml.read.session import CoreMLSession, open_chunks
from converters.coreml.write.export_plan import plan_export
from converters.coreml.write.packages import export_packages
from converters.coreml.write.state_cache import Joined, Split
from edkm_export.checkpoint import Checkpoint
from edkm_export.decoder.build import build_decoder
from edkm_export.decoder.whole_sequence import WholeSequence
from edkm_export.errors import ConversionError
from edkm_export.reference.hard_model import load_hard_model
from edkm_export.verify.bytes import compare_bytes
from edkm_export.verify.report import Verdict
from tests.helpers.odd_families import build, build_case, checkpoint_of, plain

pytest.importorskip("coremltools")

INTERFACES: dict[str, dict[str, Any]] = {
    "logits": {"interface": "logits", "sequence_length": 48},
    "swift-transformers": {"sequence_length": 48},
    "neural-engine": {"interface": "neural-engine", "sequence_length": 64, "prefill": 8, "chunks": 2},
}
_QUICK = (("qwen3_5", "swift-transformers"),)
CASES = [
    (case, interface)
    if (case, interface) in _QUICK
    else pytest.param(case, interface, marks=pytest.mark.slow)
    for case in ("lfm2", "lfm2: odd", "qwen3_5", "qwen3_5: odd")
    for interface in INTERFACES
]
PIECES = ([40], [13, *[1] * 27], [3, 20, 1, 16])
TOKENS = torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(3))


def halved(case: str) -> Checkpoint:
    """Weights that float16 holds, as a package does."""
    return checkpoint_of(build(case).half().float())


def made(checkpoint: Checkpoint, folder: Path, **options: Any) -> CoreMLArtifact:
    """Exported and opened again; the sizes are those that were predicted."""
    plan = plan_export(checkpoint, **options)
    packages = export_packages(checkpoint, plan, folder, "model")
    found = open_artifact(packages[0])
    assert isinstance(found, CoreMLArtifact), vars(found)
    for package, size in zip(packages, plan.package_sizes_bytes, strict=True):
        on_disk = sum(file.stat().st_size for file in package.rglob("weight.bin"))
        assert 0 <= size - on_disk < 64, (size, on_disk)
    return found


@torch.no_grad()
def logits_with_float16_constants(checkpoint: Checkpoint) -> Tensor:
    """Of our decoder, whose tables and epsilons are rounded as a package holds them."""
    whole = WholeSequence(build_decoder(checkpoint), checkpoint.config, len(TOKENS))
    for name, buffer in whole.named_buffers():
        if buffer.is_floating_point() and not name.startswith("mask_"):
            buffer.copy_(buffer.half())
    return whole(TOKENS[None].int())[0]


@torch.no_grad()
def divergence(checkpoint: Checkpoint, found: Tensor) -> float:
    """Largest KL divergence from transformers' own model, in nats."""
    expected = load_hard_model(checkpoint)(TOKENS[None], use_cache=False).logits[0].log_softmax(-1)
    return float((expected.exp() * (expected - found.log_softmax(-1))).sum(-1).max())


@pytest.mark.parametrize(("case", "interface"), CASES)
def test_pieces_are_the_whole_text(case, interface, tmp_path):
    checkpoint = halved(case)
    artifact = made(checkpoint, tmp_path, **INTERFACES[interface])
    rung, _ = compare_bytes(checkpoint, artifact)
    assert rung.verdict is Verdict.PASS, rung.detail
    packages, description = open_chunks(artifact.path)
    session, expected = CoreMLSession(packages, description), logits_with_float16_constants(checkpoint)
    for pieces in PIECES:
        session.reset()
        found = torch.cat([session.feed(piece) for piece in TOKENS.split(pieces)])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # float32 on both sides
    # Tables of rotation and epsilons are float16 in a package: 3e-6 at most as measured.
    assert divergence(checkpoint, found) < 3e-5
    rounded = CoreMLSession(packages, description, precision="rounded")
    found = torch.cat([rounded.feed(piece) for piece in TOKENS.split(PIECES[1])])
    assert divergence(checkpoint, found) < 1e-2  # each op rounded to float16; 2e-3 at most as measured


@pytest.mark.slow
def test_the_prefill_of_a_state_that_does_not_grow_counts_its_tokens(tmp_path):
    artifact = made(halved("lfm2"), tmp_path, **INTERFACES["neural-engine"])
    packages, _ = open_chunks(artifact.path)
    counts = [COUNT in package.functions[PREFILL].inputs for package in packages]
    assert counts == [True, False]  # a convolution, then attention
    assert not any(COUNT in package.functions[DECODE].inputs for package in packages)


def test_a_recurrence_is_held_as_the_sum_of_two():
    drawn = torch.rand(1000, generator=torch.Generator().manual_seed(1)) - 0.5
    values = (drawn + drawn.sign()) * torch.logspace(-3, 4, 1000)  # normal numbers of float16
    high, low = Split()(values)
    assert torch.equal(high, high.half().float())  # float16 holds the first part as it is
    found = Joined()(high.half(), low.half())
    relative = (found - values).abs() / values.abs()
    assert float(relative.max()) < 2.0**-21  # float16 alone: 2**-11


@pytest.mark.slow
def test_a_long_memory_needs_the_remainder(tmp_path, monkeypatch):
    """Heads that forget a five-thousandth at each token, each op rounded to float16: with one half of the state, what a
    token adds to a full matrix is less than half of its last bit.
    """
    model = build_case("qwen3_5_text", {**plain("qwen3_5_text"), "max_position_embeddings": 512})
    with torch.no_grad():
        delta = model.model.layers[0].linear_attn
        delta.A_log.fill_(-8.5)
        delta.in_proj_b.weight.mul_(0.1)
        delta.in_proj_b.weight[:, 0] -= 1.0
    checkpoint = checkpoint_of(model.half().float())
    packages, description = open_chunks(made(checkpoint, tmp_path, sequence_length=512).path)
    text = torch.randint(3, 96, (400,), generator=torch.Generator().manual_seed(5))
    exact, rounded = (CoreMLSession(packages, description, precision=name) for name in ("float32", "rounded"))
    expected = torch.cat([exact.feed(token) for token in text.split(1)])
    found = torch.cat([rounded.feed(token) for token in text.split(1)])
    state = rounded._caller._state  # type: ignore[attr-defined]
    whole = state[RECURRENCE_CACHE] + state[REMAINDER_CACHE] / 2048
    reference = exact._caller._state[RECURRENCE_CACHE] + exact._caller._state[REMAINDER_CACHE] / 2048  # type: ignore[attr-defined]
    assert found.isfinite().all() and expected.std() > 0.3
    # activations are rounded, the sums are not
    assert float((whole - reference).norm() / reference.norm()) < 0.02


def test_a_model_without_attention(tmp_path):
    """No interface with keys and values can hold it; whole texts can."""
    checkpoint = checkpoint_of(build_case("lfm2", {**plain("lfm2"), "layer_types": ["conv", "conv"]}))
    for interface in ("swift-transformers", "neural-engine"):
        with pytest.raises(ConversionError, match="no layer of it attends.*--interface logits"):
            plan_export(checkpoint, interface=interface)
    assert plan_export(checkpoint, interface="logits").context == 64
