"""States that do not grow, in Core ML programs: convolutions and recurrences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from converters.coreml.read.artifact import CoreMLArtifact, open_artifact
from converters.coreml.read.session import CoreMLSession, open_chunks
from converters.coreml.write.export_plan import plan_export
from converters.coreml.write.packages import export_packages
from edkm_export.reference.hard_model import load_hard_model
from edkm_export.verify.bytes import compare_bytes
from edkm_export.verify.report import Verdict
from edkm_export.verify.rungs import size_rung
from tests.helpers.odd_families import build, checkpoint_of

pytest.importorskip("coremltools")

CASES = ["lfm2", "lfm2: odd", "qwen3_5", "qwen3_5: odd"]
INTERFACES: dict[str, dict[str, Any]] = {
    "logits": {"interface": "logits", "sequence_length": 48},
    "swift-transformers": {"sequence_length": 48},
    "neural-engine": {"interface": "neural-engine", "sequence_length": 64, "prefill": 8, "chunks": 2},
}


def made(checkpoint: Any, folder: Path, **options: Any) -> CoreMLArtifact:
    plan = plan_export(checkpoint, **options)
    packages = export_packages(checkpoint, plan, folder, "model")
    found = open_artifact(packages[0])
    assert isinstance(found, CoreMLArtifact), vars(found)
    for package, size in zip(packages, plan.package_sizes_bytes, strict=True):
        on_disk = sum(file.stat().st_size for file in package.rglob("weight.bin"))
        assert 0 <= size - on_disk < 64, (size, on_disk)
    return found


def some_tokens(checkpoint: Any, count: int = 40) -> Tensor:
    return torch.randint(3, checkpoint.config["vocab_size"], (count,), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits_of(checkpoint: Any, tokens: Tensor) -> Tensor:
    return load_hard_model(checkpoint)(tokens[None], use_cache=False).logits[0]


@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize("case", CASES)
def test_pieces_are_the_whole_text(case, interface, tmp_path):
    checkpoint = checkpoint_of(build(case).half().float())  # the package holds float16
    artifact = made(checkpoint, tmp_path, **INTERFACES[interface])
    tokens = some_tokens(checkpoint)
    expected = logits_of(checkpoint, tokens)
    rung, _ = compare_bytes(checkpoint, artifact)
    assert rung.verdict is Verdict.PASS, rung.detail
    session = CoreMLSession(*open_chunks(artifact.path))
    for pieces in ([40], [13, *[1] * 27], [1] * 40, [3, 20, 1, 16]):
        session.reset()
        found = torch.cat([session.feed(piece) for piece in tokens.split(pieces)])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)
        print(case, interface, pieces, float((found - expected).abs().max()))
    rounded = CoreMLSession(*open_chunks(artifact.path), precision="rounded")
    found = torch.cat([rounded.feed(piece) for piece in tokens.split([13, 8, 1, 18])])
    print("rounded", float((found - expected).abs().max()))
    assert found.isfinite().all()
