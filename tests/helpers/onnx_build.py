"""A small graph with external data, written with onnx's own helpers, for tests that damage it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["damaged", "external", "linear", "write"]

Edit = Callable[[onnx.ModelProto], object]


def external(model: onnx.ModelProto, name: str = "weight") -> dict[str, str]:
    """The entries of external data of an initializer."""
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    return {entry.key: entry.value for entry in tensor.external_data}


def linear() -> tuple[onnx.ModelProto, bytes]:
    """`y = Relu(x @ weight + bias)`, weight [4, 3] and bias [3] in external data; the message and that data."""
    weight, bias = np.arange(12, dtype=np.float32).reshape(4, 3), np.ones(3, np.float32)
    data, tensors = b"", []
    for name, values in (("weight", weight), ("bias", bias)):
        tensor = numpy_helper.from_array(values, name)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": "model.onnx_data", "offset": str(len(data)), "length": str(values.nbytes)}
        for key, value in place.items():
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
        data += values.tobytes()
        tensors.append(tensor)
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["product"], name="product"),
        helper.make_node("Add", ["product", "bias"], ["sum"], name="sum"),
        helper.make_node("Relu", ["sum"], ["y"], name="relu"),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), data


def write(folder: Path, model: onnx.ModelProto, data: bytes) -> Path:
    """Write both files; path of the model."""
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    (folder / "model.onnx_data").write_bytes(data)
    return path


def damaged(folder: Path, edit: Edit) -> Path:
    """`linear()` on disk, after a change to its message."""
    model, data = linear()
    edit(model)
    return write(folder, model, data)
