"""Values of a graph that depend on its initializers alone, computed in numpy.

This is how the reader learns what a graph really does with its codes and tables: it follows the nodes instead of
believing the names. Only operators that the exporter uses to decode weights are known, and no result may be larger
than the weights of the model can explain, so that a hostile graph can not make it fill the memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.onnx.read.graph import Graph, Node
from converters.onnx.read.operators import OPERATORS, result_size
from edkm_export.errors import PackageError

__all__ = ["Evaluator"]

Array = NDArray[Any]

# Elements of a weight for each stored byte: 8 at 1 bit, as many again for padding and tables.
_ELEMENTS_PER_BYTE = 16
_SLACK = 1 << 20  # elements


class Evaluator:
    """Constants of one graph.

    Args:
        graph: the graph.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._place = {node: place for place, node in enumerate(graph.nodes)}
        stored = sum(tensor.nbytes for tensor in graph.tensors.values())
        self._limit = _ELEMENTS_PER_BYTE * stored + _SLACK
        self._parts: dict[str, Array] = {}  # of the constant that was split last: weights decoded together

    @cached_property
    def constants(self) -> frozenset[str]:
        """Every value that no input of the graph changes."""
        known = {"", *self._graph.tensors}
        for node in self._graph.nodes:
            if known.issuperset(node.inputs) or self._is_barrier(node, known):
                known.update(node.outputs)
        return frozenset(known - {""})

    @cached_property
    def has_barrier(self) -> bool:
        """True when something is kept from being folded."""
        return any(self._is_barrier(node, self.constants) for node in self._graph.nodes)

    def value(self, name: str, given: Mapping[str, Array] | None = None) -> Array:
        """Compute a value.

        Args:
            name: of the value.
            given: values to take as they are, for what depends on inputs.

        Raises:
            PackageError: it needs an operator that is not known here, an index is out of range, or sizes do not fit.
        """
        given = {**self._parts, **(given or {})}
        order = self._needed(name, given)
        last = {value: place for place, node in enumerate(order) for value in node.inputs}
        values: dict[str, Array] = {}

        def look_up(value: str) -> Array | None:
            if not value:
                return None
            for known in (given, values, self._graph.tensors):
                if value in known:
                    return known[value]
            raise PackageError(f"{self._graph.path}: {value!r} depends on the inputs of the graph.")

        for place, node in enumerate(order):
            if self._is_barrier(node, self.constants):
                values[node.outputs[0]] = np.zeros(self._barrier_length(node), np.int64)
            else:
                results = self._run(node, [look_up(value) for value in node.inputs])
                made = dict(zip(node.outputs, results, strict=False))
                values.update(made)
                if node.op == "Split" and self.constants.issuperset(node.outputs):
                    self._parts = made
            for value in node.inputs:
                if last[value] == place and value != name:
                    values.pop(value, None)
        found = look_up(name)
        assert found is not None
        return found

    def _needed(self, name: str, given: Mapping[str, Any]) -> list[Node]:
        """Nodes that a value is computed by, sorted."""
        found: set[Node] = set()
        pending = [name]
        while pending:
            value = pending.pop()
            node = self._graph.producers.get(value)
            if value in given or node is None or node in found:
                continue
            found.add(node)
            if not self._is_barrier(node, self.constants):
                pending.extend(node.inputs)
        return sorted(found, key=lambda node: self._place[node])

    def _run(self, node: Node, arguments: list[Array | None]) -> list[Array]:
        where = f"{self._graph.path}: {node}"
        operator: Callable[..., Any] | None = None if node.domain else OPERATORS.get(node.op)
        if operator is None:
            raise PackageError(f"{where}: is not among the operators that decode weights.")
        try:
            size = result_size(node.op, arguments, node.attributes)
            if size > self._limit:
                raise PackageError(f"{where}: would have {size:,} elements, more than the weights explain.")
            with np.errstate(all="ignore"):
                results = operator(*arguments, **node.attributes)
        except PackageError:
            raise
        except (
            ArithmeticError,
            AttributeError,
            IndexError,
            KeyError,
            MemoryError,
            TypeError,
            ValueError,
        ) as error:
            raise PackageError(f"{where}: cannot be computed: {str(error)[:200]}.") from error
        made = list(results) if isinstance(results, tuple) else [results]
        if any(math.prod(result.shape) > self._limit for result in made):
            raise PackageError(f"{where}: has more elements than the weights explain.")
        return made

    def _is_barrier(self, node: Node, constants: Any) -> bool:
        """True for zeros that are made from the shape of an activation, which keep a runtime from folding a weight."""
        if node.op != "Mul" or node.domain or len(node.inputs) != 2:
            return False
        for shape, zero in (node.inputs, node.inputs[::-1]):
            source = self._graph.producers.get(shape)
            if (
                source is not None
                and source.op == "Shape"
                and not source.domain
                and _shape_length(source) is not None
                and zero in constants
                and zero in self._graph.tensors
                and not self._graph.tensors[zero].any()
            ):
                return True
        return False

    def _barrier_length(self, node: Node) -> int:
        lengths = [
            _shape_length(self._graph.producers[name])
            for name in node.inputs
            if name in self._graph.producers
        ]
        (length,) = [length for length in lengths if length is not None]
        return length


def _shape_length(node: Node) -> int | None:
    """Elements that a Shape node gives, when its attributes alone say so."""
    start, end = node.integer("start", 0), node.integer("end", -1)
    return end - start if 0 <= start < end <= 8 else None
