"""Damaged and hostile graphs: refused with one typed error, before anything of them is used."""

from __future__ import annotations

import os
import resource

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from converters.onnx.read.graph import read_graph
from edkm_export.errors import PackageError
from tests.helpers.onnx_build import damaged, linear, write


def set_entry(key: str, value: str | None):
    def edit(model):
        tensor = model.graph.initializer[0]
        for entry in list(tensor.external_data):
            if entry.key == key:
                tensor.external_data.remove(entry)
        if value is not None:
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value

    return edit


def refuses(path, message: str) -> None:
    with pytest.raises(PackageError) as caught:
        read_graph(path)
    assert str(caught.value).startswith(str(path.parent)), caught.value
    assert message in str(caught.value), caught.value


def test_reads_what_was_written(tmp_path):
    graph = read_graph(write(tmp_path, *linear()))
    assert np.array_equal(graph.tensors["weight"], np.arange(12, dtype=np.float32).reshape(4, 3))
    assert graph.tensors["bias"].tolist() == [1, 1, 1]
    assert [node.op for node in graph.nodes] == ["MatMul", "Add", "Relu"]
    assert {name: str(value) for name, value in graph.inputs.items()} == {"x": "float32 [batch, 4]"}
    assert graph.external.used_bytes == graph.external.size_bytes == 60
    assert not graph.tensors["weight"].flags.writeable


# External data


@pytest.mark.parametrize(
    "name",
    [
        "../model.onnx_data",
        "..",
        ".",
        "",
        "/etc/passwd",
        "folder/model.onnx_data",
        "folder/../model.onnx_data",
        "..\\model.onnx_data",
        "C:\\model.onnx_data",
        "C:model.onnx_data",
        "model.onnx_data\0.txt",
        "./model.onnx_data",
        "file:///etc/passwd",
    ],
)
def test_names_that_lead_elsewhere(tmp_path, name):
    inner = tmp_path / "inner"
    (inner / "folder").mkdir(parents=True)
    for folder in (tmp_path, inner / "folder"):
        (folder / "model.onnx_data").write_bytes(bytes(60))
    refuses(damaged(inner, set_entry("location", name)), "only a plain name of a file beside the model")


@pytest.mark.parametrize("what", ["data", "model"])
@pytest.mark.parametrize("kind", ["symbolic", "dangling", "hard"])
def test_links(tmp_path, what, kind):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = write(folder, *linear())
    victim = path if what == "model" else folder / "model.onnx_data"
    target = tmp_path / "elsewhere"
    victim.rename(target)
    if kind == "hard":
        os.link(target, victim)
    else:
        victim.symlink_to(target if kind == "symbolic" else tmp_path / "nothing")
    with pytest.raises(PackageError, match="hard links" if kind == "hard" else "is a symbolic link"):
        read_graph(path)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "unreadable"])
def test_data_that_is_no_file(tmp_path, kind):
    path = write(tmp_path, *linear())
    data = tmp_path / "model.onnx_data"
    if kind == "unreadable":
        if os.geteuid() == 0:
            path = damaged(tmp_path, set_entry("location", "x" * 300))  # root may read all; this name no one
        else:
            data.chmod(0)
    else:
        data.unlink()
    if kind == "folder":
        data.mkdir()
    if kind == "pipe":
        os.mkfifo(data)
    with pytest.raises(
        PackageError, match="not an ordinary file" if kind in ("folder", "pipe") else "cannot be read"
    ):
        read_graph(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("offset", "13", "reach beyond the end"),
        ("offset", "61", "reach beyond the end"),
        ("offset", str(2**62), "expected a number of bytes"),
        ("offset", "-4", "expected a number of bytes"),
        ("offset", "0x10", "expected a number of bytes"),
        ("offset", "٤", "expected a number of bytes"),
        ("offset", "1_0", "expected a number of bytes"),
        ("offset", " 4", "expected a number of bytes"),
        ("offset", "4", "overlap"),
        ("length", "47", "has 47 bytes in model.onnx_data, but its type and shape need 48"),
        ("length", "49", "but its type and shape need 48"),
        ("length", "-48", "expected a number of bytes"),
        ("length", "0", "but its type and shape need 48"),
        ("key", "value", "not understood"),
        ("location", None, "only a plain name"),
        ("location", "nothing", "cannot be read"),
    ],
)
def test_wrong_places(tmp_path, key, value, message):
    refuses_at = damaged(tmp_path, set_entry(key, value))
    with pytest.raises(PackageError, match=message):
        read_graph(refuses_at)


def test_offset_and_length_may_be_left_out(tmp_path):
    def edit(model):
        set_entry("offset", None)(model)
        set_entry("length", None)(model)

    assert read_graph(damaged(tmp_path, edit)).tensors["weight"][3, 2] == 11


def test_doubled_entry(tmp_path):
    def edit(model):
        entry = model.graph.initializer[0].external_data.add()
        entry.key, entry.value = "offset", "0"

    refuses(damaged(tmp_path, edit), "names offset twice")


@pytest.mark.parametrize("size", [0, 1, 59])
def test_truncated_data(tmp_path, size):
    path = write(tmp_path, *linear())
    (tmp_path / "model.onnx_data").write_bytes(bytes(size))
    refuses(path, "reach beyond the end")


# Tensors


def tensor_edit(**fields):
    def edit(model):
        tensor = model.graph.initializer[0]
        for field, value in fields.items():
            if isinstance(value, list):
                del getattr(tensor, field)[:]
                getattr(tensor, field).extend(value)
            else:
                setattr(tensor, field, value)

    return edit


def inline(**fields):
    def edit(model):
        tensor = model.graph.initializer[0]
        del tensor.external_data[:]
        tensor.data_location = TensorProto.DEFAULT
        tensor_edit(**fields)(model)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (tensor_edit(dims=[4, -3]), "is absurd"),
        (tensor_edit(dims=[2**40]), "is absurd"),
        (tensor_edit(dims=[2**31, 2**31]), "is absurd"),
        (tensor_edit(dims=[2**30] * 5), "its type and shape need"),
        (tensor_edit(dims=[1] * 9 + [12]), "is absurd"),
        (tensor_edit(dims=[2**16, 2**16]), "its type and shape need"),
        (tensor_edit(dims=[0, 3]), "its type and shape need 0"),
        (tensor_edit(data_type=TensorProto.STRING), "data type 8"),
        (tensor_edit(data_type=TensorProto.UINT4), "data type 21"),
        (tensor_edit(data_type=0), "data type 0"),
        (tensor_edit(data_type=99), "data type 99"),
        (tensor_edit(data_type=TensorProto.FLOAT16), "its type and shape need 24"),
        (tensor_edit(raw_data=b"1234"), "inside and outside"),
        (tensor_edit(float_data=[1.0]), "inside and outside"),
        (tensor_edit(data_location=TensorProto.DEFAULT), "names external data, but says that it has none"),
        (inline(), "has 0 values, but its shape needs 12"),
        (inline(raw_data=b"12"), "has 2 bytes, but its type and shape need 48"),
        (inline(float_data=[1.0] * 11), "has 11 values"),
        (inline(int64_data=[1] * 12), "in a field that is not that of its type"),
        (inline(raw_data=bytes(48), float_data=[1.0]), "has its data twice"),
        (inline(data_type=TensorProto.UINT8, int32_data=[300] * 12), "a value beyond its type"),
        (inline(data_type=TensorProto.BOOL, raw_data=b"\2" * 12), "neither 0 nor 1"),
        (lambda model: model.graph.initializer[0].segment.__setattr__("begin", 1), "is a segment"),
    ],
)
def test_bad_tensors(tmp_path, edit, message):
    refuses(damaged(tmp_path, edit), message)


@pytest.mark.parametrize(
    ("dtype", "field", "values"),
    [
        (TensorProto.FLOAT16, "int32_data", [0x3C00] * 12),
        (TensorProto.INT8, "int32_data", [-5] * 12),
        (TensorProto.INT64, "int64_data", [-5] * 12),
        (TensorProto.UINT64, "uint64_data", [2**63] * 12),
        (TensorProto.DOUBLE, "double_data", [0.5] * 12),
        (TensorProto.BOOL, "int32_data", [1] * 12),
    ],
)
def test_typed_fields_as_onnx_reads_them(tmp_path, dtype, field, values):
    path = damaged(tmp_path, inline(data_type=dtype, **{field: values}))
    expected = onnx.numpy_helper.to_array(onnx.load(path).graph.initializer[0])
    found = read_graph(path).tensors["weight"]
    assert found.dtype == expected.dtype and np.array_equal(found, expected)


# Graphs


def add_node(op: str, inputs: list[str], outputs: list[str], **options):
    return lambda model: model.graph.node.append(helper.make_node(op, inputs, outputs, **options))


def rewire(place: int, inputs: list[str]):
    def edit(model):
        del model.graph.node[place].input[:]
        model.graph.node[place].input.extend(inputs)

    return edit


def then_branch() -> onnx.GraphProto:
    return helper.make_graph([], "empty", [], [])


def add_function(model):
    model.functions.append(
        helper.make_function(
            "", "Relu", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])], [helper.make_opsetid("", 18)]
        )
    )


def as_input(model):
    model.graph.input.append(helper.make_tensor_value_info("weight", TensorProto.FLOAT, [4, 3]))


def sizes(*dims):
    def edit(model):
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, list(dims)))

    return edit


def twice(model):
    model.graph.initializer.append(model.graph.initializer[1])


def sparse(model):
    model.graph.sparse_initializer.add()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (rewire(0, ["sum", "weight"]), "the graph has a cycle"),
        (rewire(0, ["product", "weight"]), "the graph has a cycle"),
        (rewire(0, ["nothing", "weight"]), "or is incomplete"),
        (add_node("Neg", ["y"], ["product"]), "which is there already"),
        (add_node("Neg", ["y"], ["weight"]), "which is there already"),
        (add_node("Neg", ["y"], ["x"]), "which is there already"),
        (add_node("NoSuchOp", ["y"], ["z"]), "no such standard operator"),
        (add_node("Evil", ["y"], ["z"], domain="evil.example"), "does not import"),
        (add_node("Evil", ["y"], ["z"], domain="com.microsoft"), "does not import"),
        (lambda model: model.opset_import.append(helper.make_opsetid("evil.example", 1)), "unknown domain"),
        (lambda model: model.opset_import.append(helper.make_opsetid("ai.onnx", 18)), "twice"),
        (lambda model: model.opset_import[0].__setattr__("version", -1), "absurd version"),
        (lambda model: model.opset_import.pop(), "does not import the standard operator set"),
        (
            add_node("If", ["y"], ["z"], then_branch=then_branch(), else_branch=then_branch()),
            "holds a graph or something unknown",
        ),
        (add_node("Relu", ["y"], ["z"], alpha=onnx.SparseTensorProto()), "something unknown"),
        (add_function, "has functions"),
        (sparse, "has sparse_initializer"),
        (as_input, "a caller could replace it"),
        (twice, "is unnamed or there twice"),
        (lambda model: model.graph.ClearField("node"), "holds no graph"),
        (
            lambda model: model.graph.output.append(helper.make_tensor_value_info("z", 1, [1])),
            "given by nothing",
        ),
        (sizes("batch", 2**33), "absurd size 8589934592"),
        (sizes("batch", -1), "absurd size -1"),
        (sizes(*[1] * 9), "has 9 axes"),
        (
            lambda model: model.graph.input[0].type.sequence_type.elem_type.tensor_type.__setattr__(
                "elem_type", 1
            ),
            "is no tensor",
        ),
    ],
)
def test_bad_graphs(tmp_path, edit, message):
    refuses(damaged(tmp_path, edit), message)


def test_names_that_are_no_text(tmp_path):
    model, data = linear()
    path = write(tmp_path, model, data)
    path.write_bytes(model.SerializeToString().replace(b"product", b"\xff\xfe\xfd\xfc\xfb\xfa\xf9"))
    refuses(path, "no text")


@pytest.mark.parametrize("content", [b"", b"\x00", b"garbage" * 9, b"\x0a\xff\xff\xff\xff\x0f"])
def test_what_is_no_model(tmp_path, content):
    path = write(tmp_path, *linear())
    path.write_bytes(content)
    with pytest.raises(PackageError):
        read_graph(path)


def test_truncated_model(tmp_path):
    """A message that ends early either is refused or is a shorter message; it is never read beyond its end."""
    model, data = linear()
    content = model.SerializeToString()
    path = write(tmp_path, model, data)
    for size in range(0, len(content), 3):
        path.write_bytes(content[:size])
        with pytest.raises(PackageError):
            read_graph(path)


def test_deeply_nested_message(tmp_path):
    path = write(tmp_path, *linear())
    content = b""
    for _ in range(2000):  # a graph in an attribute of a node of a graph, and so on
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            size, prefix = len(content), b""
            while size >= 128:
                prefix, size = prefix + bytes([size & 127 | 128]), size >> 7
            content = tag + prefix + bytes([size]) + content
    path.write_bytes(content)
    with pytest.raises(PackageError):
        read_graph(path)


def test_model_that_is_too_large_is_not_read(tmp_path):
    path = write(tmp_path, *linear())
    os.truncate(path, 1 << 33)  # a sparse file: takes no space
    refuses(path, "are not read")


def test_huge_claims_allocate_nothing(tmp_path):
    path = damaged(tmp_path, tensor_edit(dims=[2**30, 2**30]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuses(path, "its type and shape need")
    # kilobytes; parsing a message of 500 bytes takes far less than this
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4))
def test_random_damage_raises_nothing_else(tmp_path, flips):
    model, data = linear()
    content = bytearray(model.SerializeToString())
    for place, mask in flips:
        content[place % len(content)] ^= mask
    path = write(tmp_path, model, data)
    path.write_bytes(content)
    try:
        graph = read_graph(path)
    except PackageError:
        return
    assert sum(tensor.nbytes for tensor in graph.tensors.values()) <= len(content) + len(data)
