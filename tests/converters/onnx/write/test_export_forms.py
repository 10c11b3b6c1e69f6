"""What the profiles write: sizes, operators, and the files of a folder."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from converters.onnx import load_graph
from converters.onnx.read.interface import batch_feeds
from converters.onnx.write import forms
from converters.onnx.write.export_plan import plan_onnx
from edkm_export.errors import ConversionError, PackageError
from edkm_export.palette import PalettizedTensor
from edkm_export.recipe import uniform_recipe
from tests.helpers.exports import palettized_folder
from tests.helpers.onnx_models import export, palettized_checkpoint
from tests.helpers.palettes import random_palette

BITS = (1, 2, 3, 4, 6, 8)


@pytest.mark.parametrize(
    ("largest", "stacks"), [(1 << 20, [6]), (5000, [5]), (3100, [4, 2]), (2000, [2, 2]), (100, [])]
)
def test_no_more_weights_are_decoded_at_a_time_than_may_be(largest, stacks, monkeypatch):
    monkeypatch.setattr(forms, "_LARGEST_DECODED", largest)
    nodes = plan_onnx(palettized_checkpoint(4), runtime="low-memory").model.graph.node
    # two layers; 32x32 and twice 16x32, 32x32 and twice 48x32 weights, and one of 48 columns
    assert [len(node.output) for node in nodes if node.op_type == "Split"] == 2 * stacks


@pytest.mark.parametrize("runtime", ["exact", "low-memory", "fast"])
@pytest.mark.parametrize("n_bits", [3, 4])
def test_prediction_is_the_size_on_disk(runtime, n_bits, tmp_path):
    made = palettized_checkpoint(n_bits, int8=True)
    plan = plan_onnx(made, runtime=runtime)
    folder = export(made, tmp_path / "out", runtime=runtime) / "onnx"
    assert (folder / "model.onnx_data").stat().st_size == plan.weights_size_bytes
    assert sum(file.stat().st_size for file in folder.iterdir()) == plan.size_bytes


@pytest.mark.parametrize("runtime", ["exact", "low-memory", "fast"])
@pytest.mark.parametrize("n_bits", BITS)
def test_graphs_neither_shift_bits_nor_hold_a_weight_twice(runtime, n_bits):
    made = palettized_checkpoint(n_bits, int8=True)
    plan = plan_onnx(made, runtime=runtime)
    assert not {node.op_type for node in plan.model.graph.node} & {"BitShift", "BitwiseAnd"}
    names = [weight.name for _, weight in plan.weights]
    assert len(set(names)) == len(names)
    tables = [name for name in names if name.startswith("lm_head")]
    assert not tables  # tied to the embedding, whose codes both use


@pytest.mark.parametrize("opset", [18, 23])
def test_low_memory_decodes_no_weight_before_it_is_due(opset, monkeypatch):
    """A runtime may compute at once what depends on no layer before: all weights, if it is free to."""
    monkeypatch.setattr(forms, "_LARGEST_DECODED", 4000)  # the head in three parts, the others in one
    nodes = plan_onnx(palettized_checkpoint(4), runtime="low-memory", opset=opset).model.graph.node
    before: dict[str, set[str]] = {}  # all values that go into a value
    for node in nodes:
        inputs = set(node.input).union(*(before.get(name, set()) for name in node.input))
        before |= dict.fromkeys(node.output, inputs)
    products = {
        node.name: before[node.input[1]]
        for node in nodes
        if node.name.split("_")[-1] == "proj.weight.product"
    }
    assert len(products) == 14
    for name, values in products.items():
        assert "past_key_values.0.key" in values or "layers.0" in name, name
        assert "past_key_values.1.key" not in values or "layers.1.mlp" in name, name
    head = [node for node in nodes if node.name.startswith("model.embed_tokens.weight.product")]
    assert len(head) == 3 and "past_key_values.1.key" in before[head[0].input[1]]
    assert all(one.output[0] in before[next_.input[1]] for one, next_ in itertools.pairwise(head))


def test_planning_touches_no_weight(monkeypatch):
    made = palettized_checkpoint(3)

    def refuse(*args, **kwargs):
        raise AssertionError("a weight was decoded")

    monkeypatch.setattr(PalettizedTensor, "decode", refuse)
    monkeypatch.setattr(PalettizedTensor, "unpack_indices", refuse)
    plan_onnx(made)


def test_low_memory_is_not_folded_and_exact_is(tmp_path):
    """What onnxruntime keeps after its optimizations: codes, or dense weights."""
    made = palettized_checkpoint(4)
    kept = {}
    for runtime in ("exact", "low-memory"):
        folder = export(made, tmp_path / runtime, runtime=runtime) / "onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(tmp_path / f"{runtime}.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
        optimized = onnx.load(options.optimized_model_filepath, load_external_data=False)
        kept[runtime] = {
            tuple(tensor.dims)
            for tensor in optimized.graph.initializer
            if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2
        }
    assert (32, 48) in kept["exact"]  # gate_proj, transposed
    # cos and sin are all that is left in float32
    assert all(shape[0] == made.config["max_position_embeddings"] for shape in kept["low-memory"])


def test_fast_multiplies_with_matmulnbits(tmp_path):
    made = palettized_checkpoint(4, int8=True)
    nodes = plan_onnx(made, runtime="fast").model.graph.node
    products = [node for node in nodes if node.op_type == "MatMulNBits"]
    # queries, keys and values together; so gate and up
    assert len(products) == 2 * 4 + 1
    settings = {a.name: onnx.helper.get_attribute_value(a) for a in products[0].attribute}
    assert settings["bits"] == 8 and settings["accuracy_level"] == 4
    standard = plan_onnx(made, runtime="fast", standard_ops=True)
    assert {node.domain for node in standard.model.graph.node} == {""}


def test_fast_takes_4_bits_where_they_hold_the_entries():
    made = palettized_checkpoint(3, int8=True, int4=True)
    bits = {}
    for node in plan_onnx(made, runtime="fast").model.graph.node:
        if node.op_type == "MatMulNBits":
            bits[node.name] = next(a.i for a in node.attribute if a.name == "bits")
    fits = {
        name: int(tensor.lut.min()) >= -8 and int(tensor.lut.max()) <= 7
        for name, tensor in made.palettized.items()
    }
    assert set(bits.values()) == {4, 8}
    for name, count in bits.items():
        weight = name.removesuffix(".products").removesuffix(".product")
        assert count == (4 if fits[weight] else 8), name


def test_fast_takes_the_operators_of_onnxruntime(tmp_path):
    nodes = plan_onnx(palettized_checkpoint(4, int8=True), runtime="fast").model.graph.node
    kinds = [node.op_type for node in nodes]
    # queries and keys of two layers; each norm but the first follows a sum
    assert (
        kinds.count("RotaryEmbedding") == 2 * 2 and kinds.count("SkipSimplifiedLayerNormalization") == 2 * 2
    )
    assert "Neg" not in kinds and kinds.count("Sqrt") == 1


@pytest.mark.parametrize("opset", [22, 23, None])
@pytest.mark.parametrize("runtime", ["exact", "low-memory", "fast"])
def test_attention_is_one_operator_from_opset_23(runtime, opset):
    """The default is 23 but for `exact`; without `fast`, all operators are standard ones."""
    plan = plan_onnx(palettized_checkpoint(4, int8=True), runtime=runtime, opset=opset)
    kinds = [node.op_type for node in plan.model.graph.node]
    fused = opset == 23 or (opset is None and runtime != "exact")
    assert (kinds.count("Attention"), kinds.count("Softmax")) == ((2, 0) if fused else (0, 2))
    assert kinds.count("RotaryEmbedding") == (2 * 2 if fused or runtime == "fast" else 0)
    assert ({node.domain for node in plan.model.graph.node} == {""}) == (runtime != "fast")


@pytest.mark.parametrize(("runtime", "scale", "tables"), [("fast", 1.0, 2), ("low-memory", 8**-0.5, 0)])
def test_fast_scales_queries_by_their_tables(runtime, scale, tables):
    """Then onnxruntime multiplies a single query without a copy of the keys; a head has 8 channels."""
    nodes = plan_onnx(palettized_checkpoint(4, int8=True), runtime=runtime).model.graph.node
    attributes = [attribute for node in nodes if node.op_type == "Attention" for attribute in node.attribute]
    scales = [attribute.f for attribute in attributes if attribute.name == "scale"]
    assert scales == pytest.approx([scale, scale])
    products = {node.output[0] for node in nodes if node.op_type == "Mul"}
    rotations = [node for node in nodes if node.op_type == "RotaryEmbedding"]
    scaled = [set(node.input) & products for node in rotations]
    assert [len(found) for found in scaled] == [tables, 0, tables, 0]  # queries and keys of two layers
    assert len(set().union(*scaled)) == tables


def test_fast_in_float16_computes_what_float32_does(tmp_path):
    """Fully optimized: there onnxruntime's own float16 products would move these logits, of about 2, by 2.

    Activations that float16 pushes over a step of int8 move them by 0.02; the rounding to int8 itself, by 0.04.
    """
    made = palettized_checkpoint(4, int8=True)
    tokens = torch.arange(5, 17)
    logits = []
    for dtype in ("float32", "float16"):
        graph = load_graph(export(made, tmp_path / dtype, runtime="fast", dtype=dtype))
        logits.append(graph.runtime().run(batch_feeds(graph.graph, [tokens], len(tokens)))["logits"])
    error = logits[1].astype(np.float32) - logits[0]
    assert np.sqrt(np.square(error).mean()) < 0.1


def test_onnxruntime_fuses_the_standard_form(tiny_llama, tmp_path):
    """In matrices of at least 128 columns; it leaves some smaller ones alone."""
    made = palettized_folder(tiny_llama, uniform_recipe(3, 16, "int8"), tmp_path / "model.pt")
    folder = export(made, tmp_path / "out", runtime="fast", standard_ops=True) / "onnx"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
    optimized = onnx.load(options.optimized_model_filepath, load_external_data=False)
    assert sum(node.op_type == "MatMulNBits" for node in optimized.graph.node) == 4 * 7 + 1


# Mistakes


@pytest.mark.parametrize(("version", "refused"), [("1.23.0", True), ("1.23.2", False), ("2.0.0", False)])
def test_attention_is_not_run_where_it_is_computed_wrongly(version, refused, tmp_path, monkeypatch):
    graph = load_graph(
        export(palettized_checkpoint(4, int8=True), tmp_path / "out", runtime="fast", opset=23)
    )
    monkeypatch.setattr(onnxruntime, "__version__", version)
    if refused:
        with pytest.raises(PackageError, match=r"onnxruntime 1\.23\.0 computes its Attention wrongly"):
            graph.runtime()
    else:
        graph.runtime()


def test_fast_refuses_float_luts():
    with pytest.raises(ConversionError, match=r"15 weights have float16 LUTs, .*--lut-dtype int8"):
        plan_onnx(palettized_checkpoint(4), runtime="fast")


def test_fast_refuses_scales_whose_products_are_rounded():
    made = palettized_checkpoint(4, int8=True)
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = made.palettized[name]
    rough = replace(tensor, lut_scale=torch.full_like(tensor.lut_scale, 0.0077))
    broken = replace(made, palettized={**made.palettized, name: rough})
    with pytest.raises(ConversionError, match=rf"{name}: its int8 entries times their scale are rounded"):
        plan_onnx(broken, runtime="fast")
    plan_onnx(broken, runtime="exact")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"runtime": "small"}, "--runtime 'small' is unknown; use one of exact, low-memory, fast"),
        ({"dtype": "bfloat16"}, "--dtype 'bfloat16' is unknown"),
        ({"opset": 17}, "--opset 17 is outside 18 to 23"),
        ({"opset": 24}, "--opset 24 is outside 18 to 23"),
        ({"runtime": "fast", "standard_ops": True, "opset": 20}, "--opset 20 is outside 21 to 23"),
        ({"standard_ops": True}, "--standard-ops is for --runtime fast"),
        ({"context": 129}, "--context-length 129 is outside 2 to 128"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ConversionError, match=message):
        plan_onnx(palettized_checkpoint(4), **options)


def test_embeddings_of_vectors_are_refused():
    made = palettized_checkpoint(4)
    name = "model.embed_tokens.weight"
    vectors = random_palette((320, 32), 4, (10, 1), 2, name=name)
    with pytest.raises(ConversionError, match=rf"{name}: an embedding whose LUT holds vectors of 2"):
        plan_onnx(replace(made, palettized={**made.palettized, name: vectors}))


# The folder


def test_folder(tmp_path):
    made = replace(palettized_checkpoint(4), tokenizer={"tokenizer.json": b"{}"})
    folder = export(made, tmp_path / "out", runtime="low-memory", context=100)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == [
        "config.json", "genai_config.json", "generation_config.json", "metadata.json",
        "onnx/model.onnx", "onnx/model.onnx_data", "tokenizer.json",
    ]  # fmt: skip
    onnx.checker.check_model(str(folder / "onnx" / "model.onnx"), full_check=True)
    genai = json.loads((folder / "genai_config.json").read_text())
    assert genai["model"]["decoder"]["filename"] == "onnx/model.onnx"
    assert genai["model"]["context_length"] == 100
    assert genai["search"]["past_present_share_buffer"] is False


def test_tokenizer_file_in_the_way(tmp_path):
    made = replace(palettized_checkpoint(4), tokenizer={"genai_config.json": b"{}"})
    with pytest.raises(ConversionError, match="tokenizer file genai_config.json would take the place"):
        export(made, tmp_path / "out")


def test_names_of_open_sizes(tmp_path):
    graph = plan_onnx(palettized_checkpoint(4)).model.graph
    shapes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes["input_ids"] == ["batch_size", "sequence_length"]
    assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert shapes["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 8]
    assert shapes["present.1.value"] == ["batch_size", 2, "total_sequence_length", 8]
    assert shapes["logits"] == ["batch_size", "sequence_length", 320]
