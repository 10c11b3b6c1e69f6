"""Apple's runtime against our interpreter. Needs macOS 15; run by .github/workflows/macos.yml."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from converters.coreml.read.runtime import predicting
from converters.coreml.read.session import CoreMLSession, open_chunks
from converters.coreml.write.export_plan import plan_export
from converters.coreml.write.packages import export_packages
from edkm_export.checkpoint import Checkpoint
from edkm_export.palettization import palettize_model
from edkm_export.recipe import uniform_recipe
from tests.helpers.odd_models import build

pytestmark = [pytest.mark.macos, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    "options",
    [
        {"interface": "logits", "sequence_length": 64},
        {"interface": "swift-transformers", "sequence_length": 64},
        {"interface": "neural-engine", "sequence_length": 64, "prefill": 16},
        {"interface": "neural-engine", "sequence_length": 64, "prefill": 16, "chunks": 2},
    ],
    ids=["logits", "swift-transformers", "neural-engine", "chunks"],
)
def test_the_runtime_computes_what_the_interpreter_does(options, tmp_path: Path):
    model = build("plain")
    config = model.config.to_dict()
    parts = palettize_model(model.half(), uniform_recipe(4, 0))
    made = Checkpoint(config=config, palettized=parts.palettized, dense=parts.dense, tied=parts.tied)
    paths = export_packages(made, plan_export(made, **options), tmp_path, "model")
    packages, description = open_chunks(paths[0])
    tokens = torch.randint(320, (40,), generator=torch.Generator().manual_seed(3))
    expected = CoreMLSession(packages, description, "rounded").feed(tokens).log_softmax(-1)
    found = predicting(paths, description)(tokens).log_softmax(-1)
    # The runtime may keep sums wider, or fuse ops: what float16 rounding alone moves, an order more.
    assert float((expected.exp() * (expected - found)).sum(-1).median()) <= 1e-3
