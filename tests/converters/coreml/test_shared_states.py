"""Layers that share keys and values, heads of several sizes and per-layer embeddings, in Core ML programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from converters.coreml import load_package
from converters.coreml.read.artifact import CoreMLArtifact, open_artifact
from converters.coreml.read.session import CoreMLSession, open_chunks
from converters.coreml.write.export_plan import plan_export
from converters.coreml.write.packages import export_packages
from edkm_export.checkpoint import Checkpoint
from edkm_export.errors import ConversionError
from edkm_export.palettization import palettize_model
from edkm_export.recipe import uniform_recipe
from edkm_export.reference.hard_model import load_hard_model
from edkm_export.verify.bytes import compare_bytes
from edkm_export.verify.report import Verdict
from tests.helpers.odd_families import build, checkpoint_of

pytest.importorskip("coremltools")

PIECES = ([9, *[1] * 11], [3, 10, 1, 6])
TOKENS = torch.randint(3, 96, (20,), generator=torch.Generator().manual_seed(3))
INTERFACES: dict[str, dict[str, Any]] = {
    "swift-transformers": {"sequence_length": 48},
    "neural-engine": {"interface": "neural-engine", "sequence_length": 64, "prefill": 8},
}


def palettized(case: str) -> Checkpoint:
    model = build(case)
    config = model.config.to_dict()
    parts = palettize_model(model.half(), uniform_recipe(4, 16, fit_groups=True))
    return Checkpoint(config=config, palettized=parts.palettized, dense=parts.dense, tied=parts.tied)


@pytest.mark.parametrize(
    ("case", "interface"),
    [
        ("gemma4", "swift-transformers"),
        *(
            pytest.param(case, interface, marks=pytest.mark.slow)
            for case in ("gemma3n", "gemma4", "gemma4: odd", "gemma4: dense")
            for interface in INTERFACES
            if (case, interface) != ("gemma4", "swift-transformers")
        ),
    ],
)
def test_pieces_are_the_whole_text(case, interface, tmp_path):
    checkpoint = palettized(case)
    plan = plan_export(checkpoint, **INTERFACES[interface])
    (package,) = export_packages(checkpoint, plan, tmp_path, "model")
    artifact = open_artifact(package)
    assert isinstance(artifact, CoreMLArtifact)
    rung, _ = compare_bytes(checkpoint, artifact)
    assert rung.verdict is Verdict.PASS, rung.detail
    assert 0 <= plan.weights_size_bytes - load_package(package).weights_size_bytes < 64
    with torch.no_grad():
        expected = load_hard_model(checkpoint)(TOKENS[None], use_cache=False).logits[0].log_softmax(-1)
    packages, description = open_chunks(package)
    # Tables of rotation are float16 in a package, and in the second run each op is rounded; 7e-7 and 3e-4 at most
    # as measured.
    for precision, most in (("float32", 3e-5), ("rounded", 1e-2)):
        session = CoreMLSession(packages, description, precision=precision)
        for pieces in PIECES if precision == "float32" else PIECES[:1]:
            session.reset()
            found = torch.cat([session.feed(piece) for piece in TOKENS.split(pieces)]).log_softmax(-1)
            kl = float((expected.exp() * (expected - found)).sum(-1).max())
            assert kl < most, (precision, pieces)
    for function in load_package(package).functions.values():
        shapes = {name: state.type.shape for name, state in function.states.items()}
        assert set(shapes) == {"keyCache", "valueCache"}
        layers = checkpoint.config["num_hidden_layers"] - checkpoint.config["num_kv_shared_layers"]
        assert all(shape[0] == layers for shape in shapes.values())  # those that share have no place
        if checkpoint.config["hidden_size_per_layer_input"]:
            assert _readers_of_the_table(function.body) == ["constexpr_lut_to_dense", "gather"]


def _readers_of_the_table(body: Any) -> list[str]:
    """Types of what makes the per-layer table, and of what reads it."""
    named = (op for op in body.operations if op.outputs and "embed_tokens_per_layer" in op.outputs[0].name)
    table = next(op for op in named if op.type == "constexpr_lut_to_dense")
    readers = [op.type for op in body.operations if table.outputs[0].name in op.uses]
    return [table.type, *readers]


def test_a_package_hands_over_no_keys_and_values():
    with pytest.raises(
        ConversionError, match="--chunks 2 cuts a model whose layers read keys and values of other"
    ):
        plan_export(checkpoint_of(build("gemma4")), interface="neural-engine", chunks=2)
