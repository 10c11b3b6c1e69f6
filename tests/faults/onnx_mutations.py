"""Faults in ONNX folders: bytes of the external data, and the graph's protobuf message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edkm_export.checkpoint import Checkpoint
from tests.faults.mutation import Mutation, rope_tables_of

__all__ = ["ONNX_MUTATIONS"]

Q, K, V, OUT = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo")
Q1 = "model.layers.1.self_attn.q_proj.weight"
GATE, UP, DOWN = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
NORM, FINAL_NORM = "model.layers.1.input_layernorm.weight", "model.norm.weight"


class Graph:
    """The graph of a folder, for editing; weights stay outside."""

    def __init__(self, message: Any) -> None:
        self.message = message
        self.nodes = message.graph.node

    def maker(self, name: str) -> Any:
        return next(node for node in self.nodes if name in node.output)

    def users(self, name: str) -> list[Any]:
        return [node for node in self.nodes if name in node.input]

    def ops(self, kind: str) -> list[Any]:
        return [node for node in self.nodes if node.op_type == kind]

    def product(self, parameter: str) -> Any:
        """The MatMul with a weight."""
        return self.maker(f"{parameter}.product")

    def initializer(self, name: str) -> Any:
        return next(one for one in self.message.graph.initializer if one.name == name)

    def replace(self, old: str, new: str) -> None:
        for node in self.users(old):
            node.input[:] = [new if name == old else name for name in node.input]


def model_file(folder: Path) -> Path:
    (path,) = folder.rglob("*.onnx")
    return path


def edit(change: Callable[[Graph], object]) -> Callable[[Path, Checkpoint], None]:
    def apply(folder: Path, _checkpoint: Checkpoint) -> None:
        import onnx

        message = onnx.load_model(str(model_file(folder)), load_external_data=False)
        before = message.SerializeToString(deterministic=True)
        change(Graph(message))
        after = message.SerializeToString(deterministic=True)
        assert after != before
        model_file(folder).write_bytes(after)

    return apply


def data_of(name: str, change: Callable[[Any], object], dtype: Any = np.float16) -> Any:
    """Change the values of an initializer that lies outside."""

    def apply(folder: Path, _checkpoint: Checkpoint) -> None:
        import onnx

        path = model_file(folder)
        message = onnx.load_model(str(path), load_external_data=False)
        tensor = Graph(message).initializer(name)
        where = {entry.key: entry.value for entry in tensor.external_data}
        file = path.parent / where["location"]
        data = bytearray(file.read_bytes())
        start, size = int(where.get("offset", 0)), int(where["length"])
        values = np.frombuffer(bytes(data[start : start + size]), dtype).copy()
        known = values.tobytes()
        change(values)
        assert values.tobytes() != known
        data[start : start + size] = values.tobytes()
        file.write_bytes(data)

    return apply


def set_value(place: int, value: float) -> Callable[[Any], None]:
    def change(values: Any) -> None:
        values[place] = value

    return change


def swap_groups(values: Any) -> None:
    values[:16], values[16:32] = values[16:32].copy(), values[:16].copy()


def scale(factor: float) -> Callable[[Any], None]:
    def change(values: Any) -> None:
        values *= np.float16(factor)

    return change


def flip_last_bit(values: Any) -> None:
    values.view(np.uint16)[5] ^= 1


def lower(values: Any) -> None:
    values[7] = values[7] - 1 if values[7] else 1


def rope_base(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the tables of another base in the place of the right ones; a graph holds one half of the columns."""
    path = next(path for path in folder.rglob("*.onnx*") if path.suffix != ".onnx")
    data, length = bytearray(path.read_bytes()), checkpoint.config["max_position_embeddings"]
    wrong = rope_tables_of(checkpoint, length, rope_theta=500.0)
    for right, other in zip(rope_tables_of(checkpoint, length), wrong, strict=True):
        known, new = (table.chunk(2, -1)[0].numpy().tobytes() for table in (right, other))
        assert data.count(known) == 1
        start = data.index(known)
        data[start : start + len(known)] = new
    path.write_bytes(data)


def truncate(folder: Path, _checkpoint: Checkpoint) -> None:
    path = next(path for path in folder.rglob("*.onnx*") if path.suffix != ".onnx")
    path.write_bytes(path.read_bytes()[:-64])


def retype(kind: str, place: int, to: str) -> Callable[[Graph], None]:
    def change(graph: Graph) -> None:
        graph.ops(kind)[place].op_type = to

    return change


def swap_weights(first: str, second: str) -> Callable[[Graph], None]:
    def change(graph: Graph) -> None:
        one, other = graph.product(first), graph.product(second)
        one.input[1], other.input[1] = other.input[1], one.input[1]

    return change


def bypass_norm_weight(parameter: str) -> Callable[[Graph], None]:
    def change(graph: Graph) -> None:
        (node,) = graph.users(parameter)
        other = next(name for name in node.input if name != parameter)
        graph.replace(node.output[0], other)

    return change


def residual_add(graph: Graph, number: int) -> Any:
    layer, mlp = divmod(number, 2)
    name = f"model.layers.{layer}.{'mlp.down' if mlp else 'self_attn.o'}_proj.weight"
    return next(node for node in graph.users(graph.product(name).output[0]) if node.op_type == "Add")


def gated(graph: Graph) -> Any:
    (node,) = graph.users(graph.product(UP).output[0])
    return node


def keep_keys_back(graph: Graph) -> None:
    """Give out the keys of layer 1 as those of layer 0."""
    rename(graph, "present.0.key", "present.1.key")


def rename(graph: Graph, first: str, second: str) -> None:
    """Exchange two values by name."""
    for node in graph.nodes:
        for names in (node.input, node.output):
            names[:] = [second if name == first else first if name == second else name for name in names]


def forget_past(graph: Graph) -> None:
    """Attend to the past keys of layer 0 in the place of those of layer 1."""
    graph.replace("past_key_values.1.key", "past_key_values.0.key")


def past_behind(graph: Graph) -> None:
    """Put the past behind the new keys of layer 0."""
    node = next(node for node in graph.users("past_key_values.0.key") if node.op_type == "Concat")
    node.input[0], node.input[1] = node.input[1], node.input[0]


def positions_off_by_one(graph: Graph) -> None:
    """Look up rotations one position further whenever something is in the cache."""
    import onnx

    nodes = [
        onnx.helper.make_node("Shape", ["past_key_values.0.key"], ["past_shape"], start=2, end=3),
        onnx.helper.make_node("Clip", ["past_shape", "", "one_"], ["shift"]),
        onnx.helper.make_node("Add", ["position_ids", "shift"], ["shifted"]),
    ]
    graph.message.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1, np.int64), "one_"))
    graph.replace("position_ids", "shifted")
    kept = [type(node).FromString(node.SerializeToString()) for node in graph.nodes]
    del graph.nodes[:]
    graph.nodes.extend([*nodes, *kept])


def ignore_mask(graph: Graph) -> None:
    """Attend to padding too."""
    node = graph.ops("Min")[0]
    graph.replace(node.output[0], node.input[0])


def scores_scale(graph: Graph) -> None:
    """Attention scores of the first layer without their scale."""
    softmax = graph.ops("Softmax")[0]
    name = softmax.input[0]
    while True:
        node = graph.maker(name)
        if node.op_type in ("Mul", "Div") and any(graph_constant(graph, one) for one in node.input):
            other = next(one for one in node.input if not graph_constant(graph, one))
            graph.replace(node.output[0], other)
            return
        name = node.input[0]


def graph_constant(graph: Graph, name: str) -> bool:
    return any(one.name == name for one in graph.message.graph.initializer)


def softmax_over_queries(graph: Graph) -> None:
    (axis,) = graph.ops("Softmax")[0].attribute
    axis.i = 2


def transposed(values: list[int]) -> list[int]:
    return [*values[:-2], values[-1], values[-2]]


def permute(place: int) -> Callable[[Graph], None]:
    def change(graph: Graph) -> None:
        able = [
            node for node in graph.ops("Transpose") if node.attribute and len(node.attribute[0].ints) == 4
        ]
        ints = able[place].attribute[0].ints
        ints[:] = transposed(list(ints))

    return change


def swap_names(graph: Graph) -> None:
    for suffix in (".codes", ".lut"):
        one, other = graph.initializer(Q + suffix), graph.initializer(Q1 + suffix)
        one.name, other.name = other.name, one.name


def rename_output(graph: Graph) -> None:
    graph.maker("logits").output[0] = "scores"
    graph.message.graph.output[0].name = "scores"


def other_heads(graph: Graph) -> None:
    """Cut the queries into twice as many heads of half the size."""
    import onnx

    (node,) = (node for node in graph.users(f"{Q}.product") if node.op_type == "Reshape")
    sizes = onnx.numpy_helper.to_array(graph.initializer(node.input[1])).copy()
    sizes[-2], sizes[-1] = sizes[-2] * 2, sizes[-1] // 2
    graph.message.graph.initializer.append(onnx.numpy_helper.from_array(sizes, "other_sizes"))
    node.input[1] = "other_sizes"


def too_early(graph: Graph) -> None:
    nodes = [type(node).FromString(node.SerializeToString()) for node in graph.nodes]
    place = next(number for number, node in enumerate(nodes) if node.op_type == "MatMul")
    nodes.insert(0, nodes.pop(place))
    del graph.nodes[:]
    graph.nodes.extend(nodes)


def skip_layer(graph: Graph) -> None:
    graph.replace(residual_add(graph, 3).output[0], residual_add(graph, 1).output[0])


# Harmless


def rename_nodes(graph: Graph) -> None:
    for number, node in enumerate(graph.nodes):
        node.name = f"node_{number}"


def describe(graph: Graph) -> None:
    graph.message.doc_string = "a note"
    graph.message.producer_version = "0"


def turn_product(graph: Graph) -> None:
    node = gated(graph)
    node.input[0], node.input[1] = node.input[1], node.input[0]


def turn_sums(graph: Graph) -> None:
    for number in range(4):
        node = residual_add(graph, number)
        node.input[0], node.input[1] = node.input[1], node.input[0]


def unused(graph: Graph) -> None:
    import onnx

    graph.nodes.append(onnx.helper.make_node("Neg", ["logits"], ["nobody_reads_this"]))


def subtract_residual(graph: Graph) -> None:
    residual_add(graph, 0).op_type = "Sub"


def add_gate(graph: Graph) -> None:
    gated(graph).op_type = "Add"


ATTENTION = "model.layers.0.self_attn"

ONNX_MUTATIONS = [
    Mutation(
        "bytes",
        "one LUT value is large",
        data_of(f"{Q}.lut", set_value(8, 4.0)),
        module=f"{ATTENTION}.q_proj",
    ),
    Mutation("bytes", "one LUT value is not finite", data_of(f"{UP}.lut", set_value(3, np.inf))),
    Mutation("bytes", "last bit of a LUT value", data_of(f"{Q}.lut", flip_last_bit)),
    Mutation(
        "bytes", "swapped groups", data_of(f"{DOWN}.lut", swap_groups), module="model.layers.0.mlp.down_proj"
    ),
    Mutation(
        "bytes", "a LUT is scaled by 1.05", data_of(f"{OUT}.lut", scale(1.05)), module=f"{ATTENTION}.o_proj"
    ),
    Mutation("bytes", "one index", data_of(f"{Q}.codes", lower, np.uint8)),
    Mutation(
        "bytes", "one index of the embedding", data_of("model.embed_tokens.weight.codes", lower, np.uint8)
    ),
    Mutation("bytes", "RoPE tables of another base", rope_base, module="model.rotary_emb"),
    Mutation("bytes", "file of weights is truncated", truncate),
    Mutation("ops", "residual is subtracted", edit(subtract_residual), module="model.layers.0"),
    Mutation("ops", "gate is added", edit(add_gate), module="model.layers.0.mlp"),
    Mutation(
        "ops", "silu without its sigmoid", edit(retype("Sigmoid", 0, "Tanh")), module="model.layers.0.mlp"
    ),
    Mutation(
        "ops", "missing norm weight", edit(bypass_norm_weight(NORM)), module="model.layers.1.input_layernorm"
    ),
    Mutation(
        "ops", "missing weight of the last norm", edit(bypass_norm_weight(FINAL_NORM)), module="model.norm"
    ),
    Mutation("ops", "mean is a maximum", edit(retype("ReduceMean", 1, "ReduceMax"))),
    Mutation("ops", "rotation without its sign", edit(retype("Neg", 0, "Abs")), module="model.rotary_emb"),
    Mutation("ops", "padding is attended to", edit(ignore_mask)),
    Mutation("ops", "only what follows is attended to", edit(retype("Greater", 0, "Less")), module=ATTENTION),
    Mutation("ops", "scores without their scale", edit(scores_scale), module=ATTENTION),
    Mutation("ops", "an operator that does not exist", edit(retype("Sigmoid", 0, "Sigmoyd"))),
    Mutation("attributes", "heads are transposed otherwise", edit(permute(0))),
    Mutation("attributes", "softmax over another axis", edit(softmax_over_queries), module=ATTENTION),
    Mutation("names", "two weights have each other's name", edit(swap_names)),
    Mutation("names", "an output of another name", edit(rename_output)),
    Mutation("shapes", "queries in other heads", edit(other_heads)),
    Mutation("states", "keys of two layers exchanged on the way out", edit(keep_keys_back)),
    Mutation("states", "past of another layer", edit(forget_past), module="model.layers.1.self_attn"),
    Mutation("states", "past behind the new keys", edit(past_behind), module=ATTENTION),
    Mutation("states", "off-by-one cache position", edit(positions_off_by_one), module="model.rotary_emb"),
    Mutation("order", "key and value projection exchanged", edit(swap_weights(K, V))),
    Mutation("order", "gate and up projection exchanged", edit(swap_weights(GATE, UP))),
    Mutation("order", "a layer is skipped", edit(skip_layer)),
    Mutation("order", "a node before what it needs", edit(too_early)),
    Mutation("names", "nodes renamed", edit(rename_nodes), harmful=False),
    Mutation("names", "a note", edit(describe), harmful=False),
    Mutation("order", "factors exchanged", edit(turn_product), harmful=False),
    Mutation("order", "summands exchanged", edit(turn_sums), harmful=False),
    Mutation("ops", "a node that nobody reads", edit(unused), harmful=False),
]
