"""Norms of ones and zeros: the graph holds them, the prediction counts them, and none may be missing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from converters.onnx.read.artifact import open_artifact
from converters.onnx.read.session import OnnxSession
from edkm_export.api.artifacts import predicted_size_bytes
from edkm_export.checkpoint import Checkpoint
from edkm_export.palettization import palettize_model
from edkm_export.recipe import uniform_recipe
from edkm_export.verify.bytes import compare_bytes
from edkm_export.verify.report import Verdict
from edkm_export.verify.rungs import size_rung
from tests.helpers.onnx_models import export


def untrained(layers: int) -> Checkpoint:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": layers, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()
    config = model.config.to_dict()
    parts = palettize_model(model.half(), uniform_recipe(4, 0))
    return Checkpoint(config=config, palettized=parts.palettized, dense=parts.dense, tied=parts.tied)


@pytest.fixture(scope="module", params=["exact", "low-memory"])
def folder(request, tmp_path_factory) -> Path:
    return export(untrained(2), tmp_path_factory.mktemp("onnx") / "folder", runtime=request.param)


def test_size_and_bytes(folder):
    made, artifact = untrained(2), open_artifact(folder)
    assert artifact.weights_size_bytes() == predicted_size_bytes(made, artifact)
    rung, _ = compare_bytes(made, artifact)
    assert rung.verdict is Verdict.PASS and "left out" not in rung.detail


def test_a_layer_that_is_missing_fails(folder):
    made, artifact = untrained(3), open_artifact(folder)
    rung, _ = compare_bytes(made, artifact)
    assert rung.verdict is Verdict.FAIL
    assert "transformer.h.2.attn.c_attn.weight is missing" in rung.measures["faults"]
    assert (
        size_rung(artifact.weights_size_bytes(), predicted_size_bytes(made, artifact)).verdict is Verdict.FAIL
    )


def test_a_norm_that_is_missing_fails(tmp_path):
    """Out of graph and data, which the metadata still name; ones and zeros are no excuse in this format."""
    folder = export(untrained(2), tmp_path / "folder")
    path, name = folder / "onnx" / "model.onnx", "transformer.ln_f.bias"
    model = onnx.load(path, load_external_data=False)
    (held,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    model.graph.initializer.remove(held)
    for node in model.graph.node:
        node.input[:] = [model.graph.initializer[0].name if each == name else each for each in node.input]
    path.write_bytes(model.SerializeToString())
    rung, _ = compare_bytes(untrained(2), open_artifact(folder))
    assert rung.verdict is Verdict.FAIL and name in rung.detail


def test_paths_may_be_text(folder):
    for path in (folder, str(folder), str(folder / "onnx" / "model.onnx")):
        assert OnnxSession.open(path).context == 64
        assert open_artifact(path).path == folder


def test_a_checkpoint_of_other_norms_differs(folder):
    made = untrained(2)
    dense = {name: tensor + 1 if ".ln_" in name else tensor for name, tensor in made.dense.items()}
    rung, _ = compare_bytes(dataclasses.replace(made, dense=dense), open_artifact(folder))
    assert rung.verdict is Verdict.FAIL and len(rung.measures["faults"]) == 10
