"""Weights that share nodes, in one product or decoded together: the reader follows each, and notices what is amiss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from converters.onnx import load_graph
from edkm_export.errors import PackageError
from tests.helpers.onnx_edits import K0, UP0, V0, maker, operands

# A product of several weights, in `fast`


@pytest.fixture(params=["fast", "fast int4"])
def joint(request, change_onnx) -> Callable[[Callable[..., object]], Path]:
    """Changes a graph in which weights share a product; the edit gets its Split and its two Concats too."""

    def apply(edit: Callable[..., object]) -> Path:
        def whole(model: onnx.ModelProto) -> None:
            (entries, _), (scales, _) = operands(model, K0)
            edit(model, maker(model, f"{K0}.product"), entries, scales)

        return change_onnx(request.param, whole)

    return apply


def turned(values) -> None:
    values[:] = list(values)[::-1]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda model, cut, entries, scales: turned(scales.input), "in one piece"),
        (lambda model, cut, entries, scales: turned(cut.output), "are exchanged|other values"),
        (lambda model, cut, entries, scales: entries.input.pop(), "does not cut the results"),
        (lambda model, cut, entries, scales: cut.input.pop(), "takes parts of it and of"),
        (
            lambda model, cut, entries, scales: entries.attribute[0].__setattr__("i", 1),
            "takes parts of it and of",
        ),
        (lambda model, cut, entries, scales: setattr(scales, "op_type", "Add"), "takes parts of it and of"),
        (
            lambda model, cut, entries, scales: model.graph.node.append(
                helper.make_node("Neg", [cut.input[0]], ["unseen"], name="unseen")
            ),
            "takes parts of it and of",
        ),
    ],
    ids=["scales", "results", "fewer weights", "no sizes", "columns", "sum", "used whole"],
)
def test_weights_that_share_a_product(joint, edit, message):
    with pytest.raises(PackageError, match=message):
        load_graph(joint(edit)).palettized()


@pytest.mark.parametrize("sizes", [[32, 16, 17], [33, 15, 16], [48, 32, -16]])
def test_results_cut_in_the_wrong_places(joint, sizes):
    def edit(model, cut, entries, scales):
        model.graph.initializer.append(numpy_helper.from_array(np.array(sizes, np.int64), "sizes"))
        cut.input[1] = "sizes"

    with pytest.raises(PackageError, match="does not cut the results|uses other values"):
        load_graph(joint(edit)).palettized()


# Weights that are decoded together, in `low-memory`


class Stack:
    """The nodes of layer 0 that decode its weights together."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        turn = maker(model, maker(model, f"{K0}.product").input[1])
        self.cut = maker(model, turn.input[0])
        self.codes, self.high, self.lut = (self.joint(part) for part in ("codes", "codes_high", "lut"))

    def joint(self, part: str) -> onnx.NodeProto:
        """The Concat that takes a part of K0, or what is made of it."""
        made = {f"{K0}.{part}"}
        for node in self.model.graph.node:
            if made.intersection(node.input):
                if node.op_type == "Concat":
                    return node
                made.update(node.output)
        raise AssertionError(part)

    def sizes(self, values: list[int]) -> None:
        self.model.graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), "sizes"))
        self.cut.input[1] = "sizes"

    def late(self) -> None:
        """Leave the first row of the first weight out."""
        part = maker(self.model, self.codes.input[0])
        self.model.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.int64), "one"))
        part.input[1] = "one"


def exchange(values, first: str, second: str, part: str) -> None:
    """Exchange a part of two weights in a Concat."""
    here, there = (list(values).index(f"{name}.{part}") for name in (first, second))
    values[here], values[there] = values[there], values[here]


def both(stack: Stack) -> None:
    """Values lie where keys did, codes and LUTs alike."""
    exchange(stack.codes.input, K0, V0, "codes")
    exchange(stack.high.input, K0, V0, "codes_high")
    stack.lut.input[1], stack.lut.input[2] = stack.lut.input[2], stack.lut.input[1]


def whole(stack: Stack) -> None:
    """A product takes all weights instead of its own."""
    maker(stack.model, maker(stack.model, f"{UP0}.product").input[1]).input[0] = stack.cut.input[0]


def test_weights_of_a_layer_are_decoded_together(change_onnx):
    found = []
    load_graph(change_onnx("low-memory", lambda model: found.append(Stack(model)))).palettized()
    (stack,) = found
    assert (
        len(stack.cut.output) == 6 and len(stack.lut.input) == 6
    )  # all but down_proj, which has other columns
    assert [len(stack.codes.input), len(stack.high.input)] == [6, 6]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda stack: turned(stack.cut.output), "are exchanged|other values"),
        (lambda stack: exchange(stack.codes.input, K0, V0, "codes"), "other values"),
        (lambda stack: exchange(stack.high.input, K0, V0, "codes_high"), "other values"),
        (lambda stack: turned(stack.lut.input), "other values"),
        (both, "are exchanged"),
        (whole, "takes parts of it and of"),
        (lambda stack: stack.codes.input.pop(0), "cannot be computed"),
        (lambda stack: stack.lut.input.pop(0), "cannot be computed"),
        (lambda stack: stack.sizes([32, 16, 17, 31, 48, 48]), "other values|cannot be computed|ends after"),
        (lambda stack: stack.sizes([32, 16, 16, 32, 96]), "other values"),
        (lambda stack: stack.cut.attribute[0].__setattr__("i", 1), "cannot be computed"),
        (Stack.late, "cannot be computed"),
    ],
    ids=[
        "results", "codes", "high codes", "LUTs", "keys and values", "used whole", "fewer codes",
        "fewer LUTs", "sizes", "fewer sizes", "columns", "a row less",
    ],
)  # fmt: skip
def test_weights_that_are_decoded_together(change_onnx, edit, message):
    with pytest.raises(PackageError, match=message):
        load_graph(change_onnx("low-memory", lambda model: edit(Stack(model)))).palettized()
