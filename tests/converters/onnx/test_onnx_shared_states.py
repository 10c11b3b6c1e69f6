"""Layers that share keys and values, heads of several sizes and per-layer embeddings, in ONNX graphs."""

from __future__ import annotations

import json

import onnx
import pytest
import torch

from converters.onnx import load_graph
from converters.onnx.read.session import OnnxSession
from edkm_export.reference.hard_model import load_hard_model
from tests.helpers.odd_families import build_case, checkpoint_of, plain
from tests.helpers.onnx_models import export, family_checkpoint

TABLE = "model.embed_tokens_per_layer.weight"
TOKENS = torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("runtime", ["exact", "low-memory", "fast"])
def test_the_table_is_looked_up(runtime, tmp_path):
    """Its codes are read by nothing but a gather of the tokens' rows, in a model whose pieces make the whole text."""
    made = family_checkpoint("gemma4")
    folder = export(made, tmp_path / "out", runtime=runtime)
    graph = onnx.load(str(folder / "onnx" / "model.onnx"), load_external_data=False).graph
    codes = {each.name for each in graph.initializer if each.name.startswith(f"{TABLE}.codes")}
    readers = [node for node in graph.node if codes & set(node.input)]
    assert codes and [node.op_type for node in readers] == ["Gather"] * len(codes)
    assert all(node.input[1] == "input_ids" for node in readers)
    session = OnnxSession.open(folder, threads=1)
    with torch.no_grad():
        expected = load_hard_model(made)(TOKENS[None], use_cache=False).logits[0]
    for pieces in ([40], [13, *[1] * 27], [3, 20, 1, 16]):
        session.reset()
        found = torch.cat([session.feed(piece) for piece in TOKENS.split(pieces)])
        # "fast" rounds what it multiplies to 8 bits: 0.23 off as measured
        torch.testing.assert_close(found, expected, rtol=0, atol=0.5 if runtime == "fast" else 1e-4)


def test_layers_that_share_have_no_cache(tmp_path):
    folder = export(family_checkpoint("gemma4"), tmp_path / "out")
    graph = load_graph(folder)
    past = {name: value.shape[1:] for name, value in graph.inputs.items() if name.startswith("past")}
    assert past == {
        "past_key_values.0.key": (2, "past_sequence_length", 16),
        "past_key_values.0.value": (2, "past_sequence_length", 16),
        "past_key_values.1.key": (2, "past_sequence_length", 24),
        "past_key_values.1.value": (2, "past_sequence_length", 24),
    }
    assert not (folder / "genai_config.json").exists()  # it knows one size of heads


def test_genai_looks_for_as_many_caches_as_there_are(tmp_path):
    model = build_case("gemma4_text", {**plain("gemma4_text"), "global_head_dim": 16})
    folder = export(checkpoint_of(model), tmp_path / "out")
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    assert (decoder["num_hidden_layers"], decoder["head_size"], decoder["num_key_value_heads"]) == (2, 16, 2)
