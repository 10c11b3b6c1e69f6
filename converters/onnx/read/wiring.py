"""Does a graph compute with the weights that it says it holds?

Names prove nothing: a node may be fed from the codes of another weight, a table may be gathered in the wrong order.
So each weight is followed from its initializers to the nodes where it meets an activation. What arrives there is
computed, and must be the dense weight bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from converters.onnx.format import PARTS
from converters.onnx.read.dense_weight import DenseWeight
from converters.onnx.read.evaluate import Evaluator
from converters.onnx.read.graph import CONTRIB, Graph, Node
from converters.onnx.read.layers import Layers
from converters.onnx.read.lookups import Lookup
from edkm_export.errors import PackageError
from edkm_export.palette import PalettizedTensor

__all__ = ["Wiring"]

Array = NDArray[Any]

_BLOCKS = (CONTRIB, "MatMulNBits")


@dataclass(frozen=True)
class _Meeting:
    """Where a weight meets an activation.

    Attributes:
        node: which takes both.
        place: of its input that the weight is.
        value: name of the constant that is put there, or of the part of it that the weight is.
        result: what this gives, for a part of a product the range of its outputs.
        scales: beside `value`, for a MatMulNBits.
        rows: of the part; None: all.
    """

    node: Node
    place: int
    value: str
    result: str
    scales: str = ""
    rows: int | None = None


class Wiring:
    """The ways of all weights through one graph.

    Args:
        graph: the graph.
        names: parameters that are palettized.
    """

    def __init__(self, graph: Graph, names: Iterable[str]) -> None:
        self._graph = graph
        self._names = tuple(names)
        self._evaluator = Evaluator(graph)
        self._layers = Layers(graph)

    @property
    def profile(self) -> str:
        """The runtime profile that the nodes make, whatever the metadata say."""
        if any(node.op in ("MatMulNBits", "DequantizeLinear") for node in self._graph.nodes):
            return "fast"
        return "low-memory" if self._evaluator.has_barrier else "exact"

    def check(self, palette: PalettizedTensor) -> None:
        """Follow one weight through the graph.

        Raises:
            PackageError: nothing uses it, or what arrives where it is used is something else.
        """
        products: list[_Meeting] = []
        lookups: list[_Meeting] = []
        for meeting in self._meetings[palette.name]:
            kind = (meeting.node.domain, meeting.node.op)
            if kind in (("", "MatMul"), ("", "Gemm")) and meeting.place == 1:
                products.append(meeting)
            elif kind == _BLOCKS and meeting.place in (1, 2):
                if meeting.place == 1:  # its scales are looked at together with it
                    products.append(meeting)
            elif kind == ("", "Gather"):
                lookups.append(meeting)
            else:
                self._fail(palette.name, f"{meeting.node} uses it as no weight is used")
        dense = DenseWeight(palette)
        for pieces in self._joined(palette, products):
            self._check_products(palette.name, dense, pieces)
        self._layers.check(palette.name, {meeting.result: meeting.node for meeting in products})
        if lookups:
            sources = [meeting.node for meeting in lookups]
            if not Lookup(self._graph, self._evaluator, sources).same(dense):
                self._fail(palette.name, f"what {sources[0]} gathers does not become its rows")

    def _fail(self, name: str, what: str) -> NoReturn:
        raise PackageError(
            f"{self._graph.path}: {name}: {what}; the graph does not compute with this weight."
        )

    @cached_property
    def _origins(self) -> dict[str, tuple[str, ...]]:
        """Palettized parameters that a constant is computed from, in the order of the inputs that bring them.

        Where weights that were joined are split again, each result is taken for one of them, in that order; whether it
        is that one shows when the values are compared.
        """
        found: dict[str, tuple[str, ...]] = {
            f"{name}.{part}": (name,)
            for name in self._names
            for part in PARTS
            if f"{name}.{part}" in self._graph.tensors
        }
        for node in self._graph.nodes:
            if node.outputs[0] in self._evaluator.constants:
                merged = tuple(dict.fromkeys(name for value in node.inputs for name in found.get(value, ())))
                if node.op == "Split" and len(merged) == len(node.outputs):
                    found.update(zip(node.outputs, ((name,) for name in merged), strict=True))
                elif merged:
                    found.update(dict.fromkeys(node.outputs, merged))
        return found

    @cached_property
    def _meetings(self) -> dict[str, list[_Meeting]]:
        """Where each parameter meets an activation."""
        found: dict[str, list[_Meeting]] = {name: [] for name in self._names}
        for node in self._graph.nodes:
            if node.outputs[0] in self._evaluator.constants:
                continue
            origins = [self._origins.get(value, ()) for value in node.inputs]
            mixed = sorted({name for origin in origins for name in origin})
            if len(mixed) > 1:
                for name, meeting in self._parts(node, mixed):
                    found[name].append(meeting)
                continue
            scales = node.inputs[2] if len(node.inputs) > 2 else ""
            for place, (value, origin) in enumerate(zip(node.inputs, origins, strict=True)):
                for name in origin:
                    found[name].append(_Meeting(node, place, value, self._result(node), scales))
        for name, meetings in found.items():
            if not meetings:
                self._fail(name, "nothing uses it")
        return found

    def _parts(self, node: Node, names: list[str]) -> Iterator[tuple[str, _Meeting]]:
        """The weights in a MatMulNBits that lie one under the other, and the ranges of its outputs that they give.

        Both operands are Concats along the rows, and a Split is all that takes the result.
        """
        users = self._graph.users.get(self._result(node), ())
        joints = [self._graph.producers.get(value) for value in node.inputs[1:3]]
        if (
            (node.domain, node.op) != _BLOCKS
            or [(user.domain, user.op) for user in users] != [("", "Split")]
            or any(joint is None or joint.op != "Concat" or joint.integer("axis", -1) for joint in joints)
            or users[0].integer("axis", 0) not in (-1, 2)
            or len(users[0].inputs) != 2
        ):
            self._fail(names[0], f"{node} takes parts of it and of {names[1]}")
        cut = users[0]
        sizes = self._evaluator.value(cut.inputs[1]).reshape(-1)
        operands = [joint.inputs for joint in joints if joint is not None]
        if len({len(each) for each in (cut.outputs, sizes, *operands)}) > 1 or sizes.sum() != node.integer(
            "N", 0
        ):
            self._fail(names[0], f"{cut} does not cut the results of {node} apart by weights")
        for entries, scales, result, rows in zip(*operands, cut.outputs, sizes, strict=True):
            origins = [self._origins.get(value, ()) for value in (entries, scales)]
            if len(origins[0]) != 1 or origins[0] != origins[1]:
                self._fail(names[0], f"{node} takes parts of it and of {names[1]} in one piece")
            (name,) = origins[0]
            yield name, _Meeting(node, 1, entries, result, scales, int(rows))

    def _result(self, node: Node) -> str:
        """What a node gives, cast if it is cast at once."""
        users = self._graph.users.get(node.outputs[0], ())
        cast = len(users) == 1 and (users[0].domain, users[0].op) == ("", "Cast")
        return users[0].outputs[0] if cast else node.outputs[0]

    def _joined(self, palette: PalettizedTensor, products: list[_Meeting]) -> Iterator[list[_Meeting]]:
        """Products that give one result together: a large weight is cut into ranges of rows."""
        joints: dict[Node, list[_Meeting]] = {}
        for meeting in products:
            users = [user for user in self._graph.users.get(meeting.result, ()) if user.op != "Shape"]
            joint = users[0] if len(users) == 1 and users[0].op == "Concat" else None
            if joint is None or joint.integer("axis", 0) not in (-1, 2):
                yield [meeting]
            else:
                joints.setdefault(joint, []).append(meeting)
        for joint, meetings in joints.items():
            by_output = {meeting.result: meeting for meeting in meetings}
            if set(by_output) != set(joint.inputs) or len(meetings) != len(joint.inputs):
                self._fail(palette.name, f"{joint} joins products with it and something else")
            yield [by_output[name] for name in joint.inputs]

    def _check_products(self, name: str, dense: DenseWeight, pieces: list[_Meeting]) -> None:
        """Compare what several products use, row range after row range."""
        start = 0
        for meeting in pieces:
            if meeting.node.op == _BLOCKS[1]:
                count, same = self._same_blocks(dense, meeting, start)
            else:
                found = self._evaluator.value(meeting.value)
                turned = meeting.node.op == "Gemm" and meeting.node.integer("transB", 0)
                found = found if turned else found.T
                count, same = len(found), dense.same(found, start)
            if not same:
                self._fail(name, f"{meeting.node} uses other values than its codes and LUT give")
            start += count
        if start != dense.rows:
            self._fail(name, f"{pieces[-1].node} ends after {start} of its {dense.rows} rows")

    def _same_blocks(self, dense: DenseWeight, meeting: _Meeting, start: int) -> tuple[int, bool]:
        """Compare the operands of a MatMulNBits; its rows, and whether they are equal.

        B uint8 [rows, blocks, bytes of a block] and scales [rows * blocks] stand for (B - zero point) * scale; the
        zero point is 128 at 8 bits and 8 at 4 bits, whose low four come first (onnxruntime, docs/ContribOperators.md).
        """
        node = meeting.node
        rows, columns, size, bits = (
            int(node.attributes.get(key, 0)) for key in ("N", "K", "block_size", "bits")
        )
        rows = rows if meeting.rows is None else meeting.rows
        if min(rows, columns, size) <= 0:
            return 0, False
        blocks = -(-columns // size)
        entries, scales = self._evaluator.value(meeting.value), self._evaluator.value(meeting.scales)
        if (
            bits not in (4, 8)
            or any(node.inputs[3:5])
            or entries.dtype != np.uint8
            or entries.shape != (rows, blocks, size * bits // 8)
            or scales.size != rows * blocks
        ):
            return 0, False
        if bits == 4:  # as entries plus 128
            entries = np.stack([entries & 15, entries >> 4], axis=-1) + np.uint8(120)
        entries = entries.reshape(rows, blocks * size)[:, :columns]
        return rows, dense.same_entries(entries, scales.reshape(rows, blocks), size, start)
