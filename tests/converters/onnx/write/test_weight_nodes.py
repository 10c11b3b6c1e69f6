"""How a graph decodes palettized weights, node by node, against numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from converters.onnx.write.builder import GraphBuilder
from converters.onnx.write.codes import code_planes
from converters.onnx.write.weight_nodes import Barrier, Rows, StackNodes, WeightNodes
from edkm_export.palette import int8_scale
from tests.helpers.palettes import numpy_decode, random_palette

BITS = (1, 2, 3, 4, 6, 8)
FLOAT = onnx.TensorProto.FLOAT


def evaluate(
    graph: GraphBuilder, output: str, kind: int, optimized: bool, rank: int = 2, **feeds
) -> np.ndarray:
    """Run a part of a graph in onnxruntime."""
    tensors = [onnx.numpy_helper.from_array(each.produce(), each.name) for each in graph.weights.values()]
    inputs = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, value.shape)
        for name, value in feeds.items()
    ]
    made = onnx.helper.make_graph(
        graph.nodes, "part", inputs, [onnx.helper.make_tensor_value_info(output, kind, [None] * rank)],
        initializer=[*graph.inline, *tensors],
    )  # fmt: skip
    model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(None, feeds)[0]


def palettes(n_bits):
    """Sizes that fill bytes and sizes that do not, groups along both axes, vectors."""
    yield random_palette((8, 16), n_bits, (2, 1), seed=1)
    yield random_palette((6, 27), n_bits, (1, 1), seed=2)
    yield random_palette((12, 15), n_bits, (3, 3), seed=3)
    yield random_palette((8, 12), n_bits, (2, 2), 2, seed=4)
    yield random_palette((12, 7), n_bits, (3, 1), 4, seed=5)
    yield random_palette((8, 16), n_bits, (4, 2), int8=True, seed=6)


@pytest.mark.parametrize("n_bits", BITS)
@pytest.mark.parametrize("optimized", [True, False])
def test_every_palette_decodes_to_the_same_bits(n_bits, optimized):
    """float16 values fit float32 exactly, so no rounding is allowed: -0.0 and 0.0 differ too."""
    for tensor in palettes(n_bits):
        expected = numpy_decode(tensor)
        for kind in (FLOAT, onnx.TensorProto.FLOAT16):
            graph = GraphBuilder(18)
            value = WeightNodes(graph, tensor).values(Rows(0, tensor.index_shape[0]), kind)
            found = evaluate(graph, value, kind, optimized)
            assert found.astype(np.float16).tobytes() == expected.tobytes(), tensor.shape
            assert np.array_equal(found, expected.astype(found.dtype))


@pytest.mark.parametrize("n_bits", BITS)
def test_rows_are_decoded_in_parts_behind_a_barrier(n_bits):
    for tensor in palettes(n_bits):
        expected = numpy_decode(tensor)
        for largest in (1, 20, 60, 1000):
            graph = GraphBuilder(18)
            zero = graph.node("Mul", graph.node("Shape", "ids", start=0, end=1), graph.integers(0))
            nodes = WeightNodes(graph, tensor, Barrier(zero, zero))
            parts = nodes.parts(largest)
            assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
            assert parts[-1].stop == tensor.index_shape[0]
            value = graph.node("Concat", *(nodes.values(part, FLOAT) for part in parts), axis=0)
            found = evaluate(graph, value, FLOAT, True, ids=np.zeros(1, np.int64))
            assert np.array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize("n_bits", BITS)
@pytest.mark.parametrize("optimized", [True, False])
def test_weights_that_are_held_alike_are_decoded_together(n_bits, optimized):
    """By as many nodes as one of them, and to the same bits."""
    for columns, groups_in, dim, int8 in (
        (16, 1, 1, False),
        (27, 1, 1, True),
        (30, 2, 1, True),
        (12, 2, 2, False),
    ):
        tensors = [
            random_palette(
                (rows * dim, columns),
                n_bits,
                (rows // 4, groups_in),
                dim,
                int8=int8,
                name=f"w{rows}",
                seed=rows,
            )
            for rows in (8, 4, 12)
        ]
        assert len({StackNodes.layout(tensor) for tensor in tensors}) == 1
        graph = GraphBuilder(18)
        zero = graph.node("Mul", graph.node("Shape", "ids", start=0, end=1), graph.integers(0))
        values = StackNodes(graph, tensors, Barrier(zero, zero)).weights(FLOAT)
        assert sum(node.op_type == "Split" for node in graph.nodes) == 1
        for tensor in tensors:
            found = evaluate(graph, values[tensor.name], FLOAT, optimized, ids=np.zeros(1, np.int64))
            assert np.array_equal(found, numpy_decode(tensor).astype(np.float32)), tensor.name


def test_only_weights_that_are_held_alike_are_decoded_together():
    one = random_palette((16, 32), 3, (4, 1), int8=True)
    others = [
        random_palette((16, 32), 4, (4, 1), int8=True),
        random_palette((16, 64), 3, (4, 1), int8=True),
        random_palette((16, 32), 3, (2, 1), int8=True),
        random_palette((16, 32), 3, (4, 2), int8=True),
        random_palette((16, 32), 3, (4, 1)),
        random_palette((16, 32), 3, (4, 1), 2, int8=True),
    ]
    assert StackNodes.layout(one) == StackNodes.layout(random_palette((8, 32), 3, (2, 1), int8=True))
    assert all(StackNodes.layout(one) != StackNodes.layout(other) for other in others)


@pytest.mark.parametrize("n_bits", BITS)
def test_embedding_gathers_rows_of_codes(n_bits):
    ids = np.array([[0, 5, 3], [7, 7, 1]])
    for tensor in (
        random_palette((8, 16), n_bits, (2, 1), seed=1),
        random_palette((8, 27), n_bits, (1, 1), seed=2),
        random_palette((8, 15), n_bits, (4, 3), int8=True, seed=3),
    ):
        graph = GraphBuilder(18)
        value = WeightNodes(graph, tensor).lookup("ids", FLOAT)
        found = evaluate(graph, value, FLOAT, True, rank=3, ids=ids)
        assert np.array_equal(found, numpy_decode(tensor).astype(np.float32)[ids])
        first = next(node for node in graph.nodes if node.op_type == "Gather")
        assert list(first.input) == [f"{tensor.name}.codes", "ids"]  # nothing of the table before it


@pytest.mark.parametrize("n_bits", BITS)
def test_codes_take_their_bits(n_bits):
    tensor = random_palette((24, 64), n_bits)
    planes = code_planes(tensor)
    assert sum(plane.nbytes for plane in planes) * 8 == n_bits * tensor.numel
    bits = [np.unpackbits(plane, axis=-1, bitorder="little") for plane in planes]
    assert sum(int(each.sum()) for each in bits) == int(np.unpackbits(tensor.indices.numpy()).sum())


def test_three_bits_of_a_large_weight_stay_below_three_point_two():
    """LUTs included, groups of 16 rows of 576."""
    tensor = random_palette((576, 576), 3, (36, 1))
    graph = GraphBuilder(18)
    WeightNodes(graph, tensor).values(Rows(0, 576), FLOAT)
    stored = sum(each.size_bytes for name, each in graph.weights.items() if name.startswith(tensor.name))
    assert 3.0 <= stored * 8 / tensor.numel < 3.2


def test_int8_scales_make_products_that_float16_holds():
    largest = torch.cat((torch.logspace(-9, 4.8, 5000), torch.tensor([0.0, 65504.0, 6e-8, 127.0])))
    scale = int8_scale(largest)
    entries = torch.arange(-127, 128)
    product = scale.double()[:, None] * entries
    assert torch.equal(product.half().double(), product)
    fits = largest <= 65024  # 127 * 512; the one beyond is clipped by less than one percent
    assert bool((scale.double() * 127 >= largest.double() * (1 - 1e-7))[fits].all())
    # four significant bits are at most 1/8 too coarse; below, float16 itself is coarser
    normal = largest > 127 * 2.0**-20
    assert bool((scale.double() * 127 <= largest.double() * 1.1251)[normal].all())


@pytest.mark.parametrize("n_bits", (1, 2, 3, 4))
@pytest.mark.parametrize("optimized", [True, False])
def test_nibbles(n_bits, optimized):
    """Two entries plus 8 in a byte, the first in its low bits, against numpy; groups along both axes, parts of rows."""
    tensor = random_palette((12, 32), n_bits, (3, 2), int8=True, seed=n_bits)
    tensor = replace(tensor, lut=tensor.lut.remainder(16) - 8)
    dense = tensor.unpack_indices().numpy().reshape(3, 4, 2, 16)
    lut = tensor.lut.numpy().astype(np.int64)[..., 0]  # [3, 2, entries]
    entries = np.stack([[lut[i, j][dense[i, :, j]] for j in range(2)] for i in range(3)])  # [3, 2, 4, 16]
    entries = entries.transpose(0, 2, 1, 3).reshape(12, 32) + 8
    expected = (entries[:, ::2] + 16 * entries[:, 1::2]).astype(np.uint8)
    for rows in (Rows(0, 12), Rows(4, 8), Rows(1, 3)):
        graph = GraphBuilder(18)
        found = evaluate(graph, WeightNodes(graph, tensor).nibbles(rows), onnx.TensorProto.UINT8, optimized)
        assert np.array_equal(found, expected[rows.start : rows.stop])
