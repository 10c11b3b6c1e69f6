"""States that do not grow, in ONNX graphs: convolutions and recurrences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from converters.onnx import load_graph
from converters.onnx.read.graph import read_graph
from converters.onnx.read.session import OnnxSession
from edkm_export.errors import ConversionError, PackageError
from edkm_export.palettization import palettize_model
from edkm_export.recipe import Recipe, Rule
from tests.helpers.odd_families import build, build_case, checkpoint_of, plain
from tests.helpers.onnx_models import export

PIECES = ([40], [13, *[1] * 27], [3, 20, 1, 16])
TOKENS = torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return export(checkpoint_of(build("qwen3_5")), tmp_path_factory.mktemp("states") / "out")


@pytest.mark.parametrize("case", ["lfm2", "qwen3_5"])
def test_pieces_are_the_whole_text(case, tmp_path):
    model = build(case)
    session = OnnxSession.open(export(checkpoint_of(model), tmp_path / "out"), threads=1)
    with torch.no_grad():
        expected = model(TOKENS[None], use_cache=False).logits[0]
    for pieces in PIECES:
        session.reset()
        found = torch.cat([session.feed(piece) for piece in TOKENS.split(pieces)])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # float32 on both sides


def test_names_and_types_are_those_of_transformers_js(folder):
    graph = load_graph(folder)
    states = {name: value for name, value in graph.inputs.items() if name.startswith("past")}
    assert {name: value.shape[1:] for name, value in states.items()} == {
        "past_conv.0": (2 * 2 * 8 + 4 * 16, 4),
        "past_recurrent.0": (4, 8, 16),
        "past_key_values.1.key": (2, "past_sequence_length", 16),
        "past_key_values.1.value": (2, "past_sequence_length", 16),
    }
    assert not (folder / "genai_config.json").exists()


def test_a_recurrence_is_float32_beside_float16_activations(tmp_path):
    graph = load_graph(export(checkpoint_of(build("qwen3_5")), tmp_path / "out", dtype="float16"))
    assert graph.inputs["past_recurrent.0"].dtype == graph.outputs["present_recurrent.0"].dtype == np.float32
    assert graph.inputs["past_conv.0"].dtype == graph.outputs["logits"].dtype == np.float16


def test_a_model_without_attention(tmp_path):
    model = build_case("lfm2", {**plain("lfm2"), "layer_types": ["conv", "conv"]})
    session = OnnxSession.open(export(checkpoint_of(model), tmp_path / "out"), threads=1)
    with torch.no_grad():
        expected = model(TOKENS[None], use_cache=False).logits[0]
    found = torch.cat([session.feed(piece) for piece in TOKENS.split([7, 1, 32])])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_palettized_kernel_is_refused(tmp_path):
    model = build("lfm2")
    recipe = Recipe(rules=(Rule(match="*.conv.conv", bits=4, group_size=0), Rule(match="*", skip=True)))
    parts = palettize_model(model, recipe)
    made = checkpoint_of(build("lfm2"))
    dense = {name: tensor for name, tensor in made.dense.items() if name not in parts.palettized}
    made = type(made)(config=made.config, palettized=parts.palettized, dense=dense, tied=made.tied)
    with pytest.raises(ConversionError, match="conv.conv.weight: a palettized convolution .* leave it dense"):
        export(made, tmp_path / "out")


def _scan(model: onnx.ModelProto) -> Any:
    (node,) = (node for node in model.graph.node if node.op_type == "Scan")
    return next(entry.g for entry in node.attribute if entry.name == "body")


def _weight_in_body(model: onnx.ModelProto) -> None:
    _scan(model).initializer.append(onnx.numpy_helper.from_array(np.zeros(1, np.float32), "w"))


def _reaches_out(model: onnx.ModelProto) -> None:
    _scan(model).node[0].input[0] = "input_ids"


def _nested(model: onnx.ModelProto) -> None:
    body = _scan(model)
    inner = onnx.helper.make_node("Scan", ["matrices"], ["x"], body=onnx.helper.make_graph([], "b", [], []))
    body.node.insert(0, inner)


def _unknown(model: onnx.ModelProto) -> None:
    _scan(model).node[0].op_type = "Mull"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_weight_in_body, "its body holds weights"),
        (_reaches_out, "uses 'input_ids', which nothing before it gives"),
        (_nested, "holds a graph or something unknown"),
        (_unknown, "no such standard operator"),
    ],
)
def test_bodies_that_are_not_ours(folder, tmp_path, edit: Callable[[onnx.ModelProto], None], message: str):
    model = onnx.load_model(str(folder / "onnx" / "model.onnx"), load_external_data=False)
    edit(model)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "model.onnx_data").write_bytes((folder / "onnx" / "model.onnx_data").read_bytes())
    with pytest.raises(PackageError, match=message):
        read_graph(tmp_path / "model.onnx")


@pytest.mark.parametrize("name", ["past_conv.0", "past_recurrent.0"])
def test_states_of_other_shapes_are_refused(folder, tmp_path, name):
    model = onnx.load_model(str(folder / "onnx" / "model.onnx"), load_external_data=False)
    (value,) = (each for each in model.graph.input if each.name == name)
    value.type.tensor_type.shape.dim[1].dim_value = 1 << 25
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "model.onnx_data").write_bytes((folder / "onnx" / "model.onnx_data").read_bytes())
    with pytest.raises(PackageError, match=f"{name} is .*, expected a float"):
        OnnxSession.open(tmp_path / "model.onnx")
