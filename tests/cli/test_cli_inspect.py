from __future__ import annotations

import json

import pytest

pytest.importorskip("coremltools")

WEIGHT = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize("form", ["bundle", "package"])
def test_package(edkm, tiny_export, form):
    result = edkm("inspect", getattr(tiny_export, form))
    assert result.status == 0, result.err
    for found in (
        "function main (CoreML8)",
        "input_ids",
        "logits",
        "linear 29",
        "29 palettized weights",
        WEIGHT,
    ):
        assert found in result.out
    assert "int32" in result.out and "float16" in result.out


def test_checkpoint(edkm, tiny_export):
    result = edkm("inspect", tiny_export.model)
    assert result.status == 0, result.err
    for found in ("checkpoint", "llama", "918,656 parameters", "29 palettized weights", WEIGHT):
        assert found in result.out


@pytest.mark.parametrize("form", ["bundle", "model"])
def test_json(edkm, tiny_export, form):
    found = json.loads(edkm("inspect", getattr(tiny_export, form), "--json").out)
    expected = tiny_export.checkpoint.palettized
    rows = {row["name"]: row for row in found["palettized"]}
    assert rows.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tuple(rows[name]["shape"]) == tensor.shape and rows[name]["n_bits"] == tensor.n_bits
        assert tuple(rows[name]["groups"]) == tensor.groups and rows[name]["lut_dtype"] == "float16"
        assert rows[name]["used_centroids"] == int(tensor.used_centroids.sum())
        assert rows[name]["size_bytes"] == tensor.size_bytes
    if form == "bundle":
        (function,) = found["functions"]
        assert function["inputs"].keys() == {"input_ids"} and function["outputs"].keys() == {"logits"}
        assert function["states"] == {} and function["op_counts"]["constexpr_lut_to_dense"] >= 29


@pytest.mark.parametrize("content", [None, b"", b"garbage"])
def test_what_is_neither(edkm, tmp_path, content):
    path = tmp_path / "model.pt"
    if content is not None:
        path.write_bytes(content)
    result = edkm("inspect", path)
    assert result.status == 2 and result.message.startswith(f"{path}: ")


def test_folder_that_is_no_package(edkm, tmp_path):
    result = edkm("inspect", tmp_path)
    assert result.status == 2 and result.message.startswith(f"{tmp_path}: expected an .mlpackage")
