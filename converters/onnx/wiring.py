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

from numpy.typing import NDArray

from converters.onnx.dense import DenseWeight
from converters.onnx.evaluate import Evaluator
from converters.onnx.graph import CONTRIB, Graph, Node
from converters.onnx.layers import Layers
from converters.onnx.lookups import Lookup
from converters.onnx.storage import PARTS
from edkm_export.errors import PackageError
from edkm_export.palette import PalettizedTensor

__all__ = ["Wiring"]

Array = NDArray[Any]

_BLOCKS = (CONTRIB, "MatMulNBits")


@dataclass(frozen=True)
class _Meeting:
    """Where a weight meets an activation: input `place` of a node, which is the constant `value`."""

    node: Node
    place: int
    value: str


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
        self._layers.check(palette.name, [meeting.node for meeting in products])
        if lookups:
            sources = [meeting.node for meeting in lookups]
            if not Lookup(self._graph, self._evaluator, sources).same(dense):
                self._fail(palette.name, f"what {sources[0]} gathers does not become its rows")

    def _fail(self, name: str, what: str) -> NoReturn:
        raise PackageError(
            f"{self._graph.path}: {name}: {what}; the graph does not compute with this weight."
        )

    @cached_property
    def _origins(self) -> dict[str, frozenset[str]]:
        """Palettized parameters that a constant is computed from."""
        found = {
            f"{name}.{part}": frozenset([name])
            for name in self._names
            for part in PARTS
            if f"{name}.{part}" in self._graph.tensors
        }
        nothing: frozenset[str] = frozenset()
        for node in self._graph.nodes:
            if node.outputs[0] in self._evaluator.constants:
                merged = nothing.union(*(found.get(value, nothing) for value in node.inputs))
                if merged:
                    found.update(dict.fromkeys(node.outputs, merged))
        return found

    @cached_property
    def _meetings(self) -> dict[str, list[_Meeting]]:
        """Where each parameter meets an activation."""
        found: dict[str, list[_Meeting]] = {name: [] for name in self._names}
        for node in self._graph.nodes:
            if node.outputs[0] in self._evaluator.constants:
                continue
            origins = [self._origins.get(value, frozenset[str]()) for value in node.inputs]
            mixed = sorted(frozenset[str]().union(*origins))
            if len(mixed) > 1:
                self._fail(mixed[0], f"{node} takes parts of it and of {mixed[1]}")
            for place, (value, origin) in enumerate(zip(node.inputs, origins, strict=True)):
                for name in origin:
                    found[name].append(_Meeting(node, place, value))
        for name, meetings in found.items():
            if not meetings:
                self._fail(name, "nothing uses it")
        return found

    def _joined(self, palette: PalettizedTensor, products: list[_Meeting]) -> Iterator[list[_Meeting]]:
        """Products that give one result together: a large weight is cut into ranges of rows."""
        joints: dict[Node, list[_Meeting]] = {}
        for meeting in products:
            users = self._graph.users.get(meeting.node.outputs[0], ())
            joint = users[0] if len(users) == 1 and users[0].op == "Concat" else None
            if joint is None or joint.integer("axis", 0) not in (-1, 2):
                yield [meeting]
            else:
                joints.setdefault(joint, []).append(meeting)
        for joint, meetings in joints.items():
            by_output = {meeting.node.outputs[0]: meeting for meeting in meetings}
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

        B uint8 [rows, blocks, block size] and scales [rows * blocks] stand for (B - zero point) * scale; the zero
        point is 128 at 8 bits when it is left out (onnxruntime, docs/ContribOperators.md).
        """
        node = meeting.node
        rows, columns, size, bits = (
            int(node.attributes.get(key, 0)) for key in ("N", "K", "block_size", "bits")
        )
        if min(rows, columns, size) <= 0:
            return 0, False
        blocks = -(-columns // size)
        steps, scales = self._evaluator.value(meeting.value), self._evaluator.value(node.inputs[2])
        if (
            bits != 8
            or any(node.inputs[3:5])
            or steps.shape != (rows, blocks, size)
            or scales.size != rows * blocks
        ):
            return 0, False
        steps = steps.reshape(rows, blocks * size)[:, :columns]
        return rows, dense.same_steps(steps, scales.reshape(rows, blocks), size, start)
