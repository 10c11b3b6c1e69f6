"""`verify` and `inspect` on ONNX folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest

from tests.helpers.onnx_build import external
from tests.helpers.onnx_models import export

WEIGHT = "model.layers.1.mlp.down_proj.weight"
TOKENS = ("--tokens", "128")


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tmp_path_factory) -> Path:
    return export(tiny_checkpoint, tmp_path_factory.mktemp("onnx") / "tiny-onnx", runtime="exact")


@pytest.fixture(scope="module")
def copy(folder, tmp_path_factory):
    return lambda: Path(shutil.copytree(folder, tmp_path_factory.mktemp("copy") / "tiny-onnx"))


def flip(folder: Path, name: str, place: int, mask: int) -> None:
    """Change one byte of an initializer, on disk."""
    model = onnx.load(folder / "onnx" / "model.onnx", load_external_data=False)
    data = folder / "onnx" / "model.onnx_data"
    content = bytearray(data.read_bytes())
    content[int(external(model, name)["offset"]) + place] ^= mask
    data.write_bytes(content)


def verified(edkm, tiny_checkpoint, folder: Path, report: Path) -> tuple[int, dict[str, dict]]:
    """Exit status, and the rungs by id."""
    result = edkm("verify", tiny_checkpoint.path, folder, *TOKENS, "--report", report)
    assert "Traceback" not in result.err, result.err
    found = json.loads((report / "report.json").read_text())
    return result.status, {rung["id"]: rung for rung in found["rungs"]}


@pytest.mark.parametrize("form", ["", "onnx/model.onnx"])
def test_verify_passes(edkm, tiny_checkpoint, folder, tmp_path, form):
    status, rungs = verified(edkm, tiny_checkpoint, folder / form, tmp_path / "report")
    assert status == 0
    ran = [name for name, rung in rungs.items() if rung["verdict"] == "PASS"]
    for name in (
        "bytes",
        "size",
        "context",
        "execution-onnxruntime",
        "execution-onnxruntime-plain",
        "execution-onnxruntime-padded",
        "execution-reference",
        "prefill-decode",
        "continuation",
    ):
        assert name in ran, rungs[name]
    assert rungs["bytes"]["measures"]["bit_exact"] == 29
    assert json.loads((tmp_path / "report" / "report.json").read_text())["kind"] == "ONNX folder"


def test_verify_of_the_unpalettized_control(edkm, dense_export, tmp_path):
    """The same way with nothing palettized must pass, or a failure would prove nothing about palettes."""
    folder = export(dense_export.checkpoint, tmp_path / "dense-onnx", runtime="exact")
    status, rungs = verified(edkm, dense_export.checkpoint, folder, tmp_path / "report")
    assert status == 0 and rungs["execution-onnxruntime"]["verdict"] == "PASS"


@pytest.mark.parametrize("part", ["codes", "lut"])
def test_verify_notices_one_changed_byte(edkm, tiny_checkpoint, copy, tmp_path, part):
    changed = copy()
    flip(changed, f"{WEIGHT}.{part}", 7, 0x04)
    status, rungs = verified(edkm, tiny_checkpoint, changed, tmp_path / "report")
    assert status == 1
    assert rungs["bytes"]["verdict"] == "FAIL" and f"{WEIGHT} differs" in rungs["bytes"]["detail"]


def test_verify_notices_a_changed_norm(edkm, tiny_checkpoint, copy, tmp_path):
    changed = copy()
    flip(changed, "model.norm.weight", 3, 0x08)
    status, rungs = verified(edkm, tiny_checkpoint, changed, tmp_path / "report")
    assert status == 1 and "model.norm.weight differs" in rungs["bytes"]["detail"]


def test_verify_notices_another_graph(edkm, tiny_checkpoint, copy, tmp_path):
    """Weights are as they should be, but attention is scaled differently: only running the graph shows it."""
    changed = copy()
    path = changed / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    (first, *_) = [node for node in model.graph.node if node.op_type == "Softmax"]
    place = list(model.graph.node).index(first)
    taken = first.input[0]
    model.graph.node[place].input[0] = "scores"
    model.graph.node.insert(
        place, onnx.helper.make_node("Mul", [taken, "half"], ["scores"], name="half_scores")
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(_half()), "half"))
    path.write_bytes(model.SerializeToString())
    status, rungs = verified(edkm, tiny_checkpoint, changed, tmp_path / "report")
    assert status == 1 and rungs["bytes"]["verdict"] == "PASS"
    for name in ("execution-onnxruntime", "execution-onnxruntime-plain", "execution-reference"):
        assert rungs[name]["verdict"] == "FAIL"


def _half() -> onnx.TensorProto:
    return onnx.helper.make_tensor("half", onnx.TensorProto.FLOAT, [], [0.5])


@pytest.mark.parametrize("damage", ["truncated", "missing", "garbage"])
def test_verify_of_a_damaged_folder(edkm, tiny_checkpoint, copy, tmp_path, damage):
    changed = copy()
    data, model = changed / "onnx" / "model.onnx_data", changed / "onnx" / "model.onnx"
    if damage == "truncated":
        data.write_bytes(data.read_bytes()[:-100])
    elif damage == "missing":
        data.unlink()
    else:
        model.write_bytes(b"garbage")
    status, rungs = verified(edkm, tiny_checkpoint, changed, tmp_path / "report")
    assert status == 1 and rungs["bytes"]["verdict"] == "FAIL"


def test_verify_of_another_checkpoint(edkm, small_export, folder):
    result = edkm("verify", small_export.model, folder, *TOKENS)
    assert result.status in (1, 2) and "Traceback" not in result.err


def test_inspect(edkm, folder):
    result = edkm("inspect", folder)
    assert result.status == 0, result.err
    for found in (
        "ONNX folder",
        "runtime profile exact, context of 512 positions",
        "past_key_values.0-3.key: float32 [batch_size, 2, past_sequence_length, 32]",
        "logits: float32 [batch_size, sequence_length, 1024]",
        "29 palettized weights",
        WEIGHT,
    ):
        assert found in result.out


def test_inspect_json(edkm, tiny_checkpoint, folder):
    found = json.loads(edkm("inspect", folder, "--json").out)
    assert (found["kind"], found["profile"], found["context_length"]) == ("ONNX folder", "exact", 512)
    assert found["size_bytes"] > found["weights_size_bytes"] > 0
    rows = {row["name"]: row for row in found["palettized"]}
    assert rows.keys() == tiny_checkpoint.palettized.keys()
    for name, tensor in tiny_checkpoint.palettized.items():
        assert tuple(rows[name]["shape"]) == tensor.shape and rows[name]["n_bits"] == tensor.n_bits
        assert rows[name]["used_centroids"] == int(tensor.used_centroids.sum())
    assert found["dense"].keys() == tiny_checkpoint.dense.keys()
    assert found["functions"][0]["op_counts"]["MatMul"] >= 29


def test_inspect_refuses_what_is_damaged(edkm, copy):
    changed = copy()
    (changed / "onnx" / "model.onnx").write_bytes(b"garbage")
    result = edkm("inspect", changed)
    assert result.status == 2 and result.message.startswith(f"{changed / 'onnx' / 'model.onnx'}: ")
