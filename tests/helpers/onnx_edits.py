"""Changes of the message of an exported graph, for tests of its reader."""

from __future__ import annotations

from collections.abc import Callable

import onnx

from converters.onnx.format import PARTS

__all__ = [
    "GATE0",
    "K0",
    "K1",
    "UP0",
    "V0",
    "Edit",
    "exchange",
    "exchange_parts",
    "maker",
    "operands",
    "rename",
    "replace_uses",
    "sort",
]

Edit = Callable[[onnx.ModelProto], object]

K0, V0 = "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"
K1 = "model.layers.1.self_attn.k_proj.weight"
UP0, GATE0 = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"


def maker(model: onnx.ModelProto, value: str) -> onnx.NodeProto:
    (node,) = [node for node in model.graph.node if value in node.output]
    return node


def operands(model: onnx.ModelProto, name: str) -> list[tuple[onnx.NodeProto, int]]:
    """Where a weight is put in: inputs of its product, or of the Concats in front of one that it shares."""
    node = maker(model, f"{name}.product")
    if node.op_type != "Split":
        return [(node, place) for place in range(1, len(node.input))]
    product, place = maker(model, node.input[0]), list(node.output).index(f"{name}.product")
    return [(maker(model, value), place) for value in product.input[1:]]


def exchange(first: str, second: str):
    """Let the products of two weights take each other's operands."""

    def edit(model):
        for (one, here), (two, there) in zip(operands(model, first), operands(model, second), strict=True):
            one.input[here], two.input[there] = two.input[there], one.input[here]
        sort(model)

    return edit


def exchange_parts(first: str, second: str):
    """Let whatever takes a part of one weight take that of the other: its nodes decode the other's codes."""

    def edit(model):
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                weight, _, part = name.rpartition(".")
                if weight in (first, second) and part in PARTS:
                    node.input[place] = f"{second if weight == first else first}.{part}"

    return edit


def sort(model: onnx.ModelProto) -> None:
    """Put nodes behind those whose results they take."""
    known = {
        "",
        *(tensor.name for tensor in model.graph.initializer),
        *(value.name for value in model.graph.input),
    }
    waiting, done = list(model.graph.node), []
    while waiting:
        ready = [node for node in waiting if known.issuperset(node.input)]
        assert ready, "a cycle"
        known.update(name for node in ready for name in node.output)
        done += ready
        waiting = [node for node in waiting if not any(node is one for one in ready)]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in done]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def rename(first: str, second: str, part: str):
    """Exchange the names of two initializers, and so what lies behind them."""

    def edit(model):
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        one, two = tensors[f"{first}.{part}"], tensors[f"{second}.{part}"]
        one.name, two.name = two.name, one.name

    return edit


def replace_uses(model, old: str, new: str, but: onnx.NodeProto | None = None) -> None:
    for node in model.graph.node:
        if node is not but:
            for place, name in enumerate(node.input):
                if name == old:
                    node.input[place] = new
