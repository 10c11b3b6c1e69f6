"""An embedding in a graph: rows of a palettized weight, gathered by token or position before they are decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.onnx.format import INPUT_IDS, POSITION_IDS, TOKEN_TYPES
from converters.onnx.read.dense_weight import DenseWeight
from converters.onnx.read.evaluate import Evaluator
from converters.onnx.read.graph import Graph, Node

__all__ = ["Lookup"]

# Positions come first: an embedding model counts them from the shape of its token ids.
_INPUTS = (POSITION_IDS, TOKEN_TYPES, INPUT_IDS)
_TOKENS = 4096  # looked up at a time


class Lookup:
    """Follows gathered codes to where they have become rows of values.

    Args:
        graph: the graph.
        evaluator: of its values.
        sources: the nodes that gather parts of the weight.
    """

    def __init__(self, graph: Graph, evaluator: Evaluator, sources: Sequence[Node]) -> None:
        self._graph = graph
        self._evaluator = evaluator
        self._sources = frozenset(sources)

    def same(self, dense: DenseWeight) -> bool:
        """True when every token, or every position, gets its row of the weight, bit for bit.

        Raises:
            PackageError: the rows cannot be followed.
        """
        ends = (
            (name, ids)
            for ids in _INPUTS
            for name in self._bottlenecks(ids)
            if self._rows(name, ids, 0, 2, dense) is not None
        )
        end, ids = next(ends, ("", ""))
        if not end:
            return False
        for start in range(0, dense.rows, _TOKENS):
            rows = self._rows(end, ids, start, min(start + _TOKENS, dense.rows), dense)
            if rows is None or not dense.same(rows, start):
                return False
        return True

    def _rows(self, name: str, ids: str, start: int, stop: int, dense: DenseWeight) -> NDArray[Any] | None:
        """A value for `ids` from `start` to `stop`, as [ids, columns]; None when it is no such matrix."""
        stop = min(stop, dense.rows)
        value = self._evaluator.value(name, {ids: np.arange(start, stop, dtype=np.int64)[None]})
        fits = value.shape == (1, stop - start, dense.columns) and value.dtype.kind == "f"
        return value[0] if fits else None

    def _values_of(self, ids: str) -> frozenset[str]:
        """Values that depend on an input and on constants, and on nothing else."""
        known, found = {"", ids, *self._evaluator.constants}, set[str]()
        for node in self._graph.nodes:
            if node.outputs[0] not in known and known.issuperset(node.inputs):
                known.update(node.outputs)
                found.update(node.outputs)
        return frozenset(found)

    def _bottlenecks(self, ids: str) -> Iterator[str]:
        """Values that everything gathered goes through, in order: what the graph uses is computed from them alone."""
        followed = self._values_of(ids)
        waiting = set(self._sources)
        uses: dict[str, int] = {}  # nodes that have not been passed yet, by value
        for node in self._graph.nodes:
            if node not in self._sources and not any(name in uses for name in node.inputs):
                continue
            if not all(name in followed for name in node.outputs):
                continue  # a use outside: what it takes stays open
            waiting.discard(node)
            for name in dict.fromkeys(node.inputs):
                if name in uses:
                    uses[name] -= 1
            for name in node.outputs:
                uses[name] = len(self._graph.users.get(name, ()))
            if not waiting and [name for name, count in uses.items() if count] == [node.outputs[0]]:
                yield node.outputs[0]
