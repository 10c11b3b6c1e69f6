"""ONNX decoders whose keys and values are int8: what they compute, and faults that must show."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from converters.onnx import load_graph
from converters.onnx.read.artifact import OnnxArtifact
from converters.onnx.read.session import OnnxSession
from converters.onnx.write.export_plan import plan_onnx
from edkm_export.artifact.metrics import divergence
from edkm_export.artifact.protocol import kv_cache_of
from edkm_export.errors import ConversionError, PackageError
from edkm_export.reference.hard_model import load_hard_model
from edkm_export.verify.continuation import compare_continuations, hard_against_decode
from edkm_export.verify.held_keys import Reader
from edkm_export.verify.report import Rung, Verdict
from edkm_export.verify.rungs import execution_rung
from tests.helpers.onnx_edits import Edit, sort
from tests.helpers.onnx_models import export, family_checkpoint, palettized_checkpoint

TOKENS = torch.randint(3, 90, (40,), generator=torch.Generator().manual_seed(5))
CONFIG = palettized_checkpoint(4).config
LAYERS, HEADS, WIDTH = (CONFIG[key] for key in ("num_hidden_layers", "num_key_value_heads", "head_dim"))
STATES = ("key", "key_scale", "value", "value_scale")


@pytest.fixture(scope="module")
def model():
    return load_hard_model(palettized_checkpoint(4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return export(palettized_checkpoint(4), tmp_path_factory.mktemp("int8") / "out", kv_cache="int8")


def rungs(folder: Path, model: torch.nn.Module) -> dict[str, Rung]:
    """Of each execution, on a short text."""
    artifact, made = OnnxArtifact(load_graph(folder)), {}
    for execution in artifact.executions:
        assert execution.held is not None
        reader = Reader(model)
        logits = reader.beside(execution.held)(TOKENS)
        distance = divergence(zip(reader.expected, [logits], strict=True))
        made[execution.id] = execution_rung(execution, distance, misfit=reader.misfit)
    return made


def test_interface(folder):
    graph = load_graph(folder)
    past = {name: str(value) for name, value in graph.inputs.items() if name.startswith("past_key_values.1.")}
    forms = (
        ["int8", f"{HEADS}, past_sequence_length, {WIDTH}]"],
        ["float32", f"{HEADS}, past_sequence_length, 1]"],
    )
    assert [name.rpartition(".")[2] for name in past] == list(STATES)
    for value, (kind, shape) in zip(past.values(), forms * 2, strict=True):
        assert value.startswith(kind) and value.endswith(shape)
    assert kv_cache_of(OnnxArtifact(graph)) == "int8"
    assert json.loads((folder / "metadata.json").read_text())[
        "cache_bytes_per_token"
    ] == LAYERS * 2 * HEADS * (WIDTH + 4)
    assert not (folder / "genai_config.json").exists()  # its cache is float


def test_each_way_to_run_it_computes_what_hard_pytorch_reads(folder, model):
    found = rungs(folder, model)
    assert {rung.verdict for rung in found.values()} == {Verdict.PASS}
    for rung in found.values():
        assert (
            rung.measures["kl_max"] < 1e-8
        )  # as float graphs: rounding to int8 is shared, all else is float32
        assert rung.measures["code_error_steps"] < 0.51 and rung.measures["scale_error"] < 1e-4
        assert rung.measures["codes"] == LAYERS * 2 * HEADS * len(TOKENS) * WIDTH


def test_token_by_token(folder, model):
    session, reader = OnnxSession.open(folder, threads=1), Reader(model)
    assert hard_against_decode(session, reader, TOKENS).kl_max < 1e-8
    assert reader.misfit.steps < 0.51
    for pieces in ([40], [13, *[1] * 27], [3, 20, 1, 16]):
        session.reset()
        found = torch.cat([session.feed(piece) for piece in TOKENS.split(pieces)])
        torch.testing.assert_close(found, reader.read(TOKENS, session.held()), rtol=0, atol=1e-4)


def test_it_is_not_a_float_cache(folder, model):
    """What is compared would show an export that only says that it rounds."""
    session = OnnxSession.open(folder, threads=1)
    with torch.no_grad():
        floats = model(TOKENS[None], use_cache=False).logits[0]
    assert (session.feed(TOKENS) - floats).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"runtime": "low-memory"}, {"opset": 23}], ids=str)
def test_other_forms(options, model, tmp_path):
    found = rungs(export(palettized_checkpoint(4), tmp_path / "out", kv_cache="int8", **options), model)
    assert {rung.verdict for rung in found.values()} == {Verdict.PASS}


@pytest.mark.parametrize("case", ["gemma4", "gemma3n", "gemma2", "gpt2", "lfm2", "qwen3_5"])
def test_families(case, tmp_path):
    """Shared keys, heads of two sizes, capped scores, windows, and layers with states that stay floats."""
    made = family_checkpoint(case)
    session = OnnxSession.open(export(made, tmp_path / "out", kv_cache="int8"), threads=1)
    reader = Reader(load_hard_model(made))
    found = torch.cat([session.feed(piece) for piece in TOKENS.split([23, 1, 16])])
    torch.testing.assert_close(found, reader.read(TOKENS, session.held()), rtol=0, atol=1e-4)
    assert reader.misfit.steps < 0.51 and reader.misfit.scale < 1e-3


# Faults


def changed(folder: Path, place: Path, edit: Edit) -> Path:
    shutil.copytree(folder, place)
    path = place / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    edit(model)
    path.write_bytes(model.SerializeToString())
    return place


def constant(model: onnx.ModelProto, value: float) -> onnx.TensorProto:
    (found,) = [
        one for one in model.graph.initializer if one.dims == [] and onnx.numpy_helper.to_array(one) == value
    ]
    return found


def larger_scales(model: onnx.ModelProto) -> None:
    """Codes up to 63, read with the same scales: the numbers are nearly right."""
    one = constant(model, 127)
    one.CopyFrom(onnx.numpy_helper.from_array(np.asarray(63.5, np.float32), one.name))


def read_twice(model: onnx.ModelProto) -> None:
    """Keys of a layer are read with twice their scale."""
    scales = "present.0.key_scale"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(2, np.float32), "two"))
    place, node = next(
        (place, node)
        for place, node in enumerate(model.graph.node)
        if node.op_type == "Mul" and scales in node.input
    )
    node.input[list(node.input).index(scales)] = "doubled"
    model.graph.node.insert(place, onnx.helper.make_node("Mul", [scales, "two"], ["doubled"]))


def exchanged(stem: str) -> Callable[[onnx.ModelProto], None]:
    """Keys take the scales of values, and values those of keys."""
    key, value = f"{stem}.key_scale", f"{stem}.value_scale"
    other = {key: value, value: key}

    def edit(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for names in (node.input, node.output):
                for place, name in enumerate(names):
                    names[place] = other.get(name, name)

    return edit


def exchanged_where_read(model: onnx.ModelProto) -> None:
    key, value = "present.0.key_scale", "present.0.value_scale"
    readers = [node for node in model.graph.node if node.op_type == "Mul" and {key, value} & set(node.input)]
    assert len(readers) == 2
    for node in readers:
        for place, name in enumerate(node.input):
            node.input[place] = {key: value, value: key}.get(name, name)
    sort(model)


FAULTS: dict[str, Edit] = {
    "scales twice too large": larger_scales,
    "read with twice the scale": read_twice,
    "scales of keys and values exchanged, held": exchanged("present.0"),
    "scales of keys and values exchanged, read": exchanged_where_read,
    "scales of keys and values exchanged, past": exchanged("past_key_values.1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_fail(fault, folder, model, tmp_path):
    found = rungs(changed(folder, tmp_path / "out", FAULTS[fault]), model)
    failed = {name for name, rung in found.items() if rung.verdict is Verdict.FAIL}
    past = fault.endswith("past")  # shows with a past alone, as the batch has one
    assert failed == ({"execution-onnxruntime-padded"} if past else found.keys())


def test_a_fault_of_the_past_shows_in_decoding_and_in_texts(folder, model, tmp_path):
    broken = OnnxArtifact(
        load_graph(changed(folder, tmp_path / "out", FAULTS["scales of keys and values exchanged, past"]))
    )
    session = broken.session()
    assert hard_against_decode(session, Reader(model), TOKENS).kl_max > 1e-3

    class Words:
        decode = staticmethod(str)

    (one,) = compare_continuations(broken, session, model, Words, {"p": TOKENS[:8]}, 24, reader=Reader(model))
    assert not one.ok


def test_metadata_that_do_not_fit(folder, onnx_folder, tmp_path):
    def says(model, value):
        (entry,) = [one for one in model.metadata_props if one.key == "edkm_export.kv_cache"]
        entry.value = value

    unknown = changed(folder, tmp_path / "unknown", lambda model: says(model, "int4"))
    with pytest.raises(PackageError, match="kv_cache is 'int4', expected one of float, int8"):
        load_graph(unknown)
    floats = changed(folder, tmp_path / "floats", lambda model: says(model, "float"))
    with pytest.raises(PackageError, match=r"key_scale is unknown"):
        OnnxArtifact(load_graph(floats))

    def claim(model):
        model.metadata_props.add(key="edkm_export.kv_cache", value="int8")

    with pytest.raises(PackageError, match=r"key_scale is missing"):
        OnnxSession.open(changed(onnx_folder("exact"), tmp_path / "claims", claim))


def test_scales_of_another_shape(folder, tmp_path):
    def widen(model):
        (value,) = [one for one in model.graph.input if one.name == "past_key_values.0.key_scale"]
        value.type.tensor_type.shape.dim[3].dim_value = 2

    with pytest.raises(PackageError, match=r"key_scale is .* expected a float \[batch, kv_heads, past, 1\]"):
        OnnxArtifact(load_graph(changed(folder, tmp_path / "out", widen)))


def test_what_has_no_keys_is_refused():
    with pytest.raises(ConversionError, match="--kv-cache 'int4' is unknown"):
        plan_onnx(palettized_checkpoint(4), kv_cache="int4")
